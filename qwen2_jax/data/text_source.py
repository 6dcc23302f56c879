"""JSON lines and plain text: files are cut into pieces at the ends of rows; workers take the rows out of a piece."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen2_jax.data.decompress import blocks
from qwen2_jax.data.rows import Unusable, text_of
from qwen2_jax.data.source_files import PIECE_BYTES, Piece, SourceFile, SourceOptions, opened
from qwen2_jax.errors import UserError

MOST_BYTES = 256 << 20      # of a row: what is longer is hardly a document, and would fill the memory
BOM = b"\xef\xbb\xbf"
BLANK = re.compile(rb"\n[ \t\r]*\n")     # ends a paragraph


def pieces(file: SourceFile, options: SourceOptions, row: int, offset: int) -> Iterator[Piece]:
    """Pieces from byte `offset` of the uncompressed text, where row `row` starts. Where a piece ends depends on where
    it starts, and on the text alone. Raises UserError for a row of more than MOST_BYTES, and for a damaged file."""
    unit = _unit(file, options)
    with opened(file) as stream:
        if file.compression is None:
            stream.seek(offset)
        text = blocks(stream, file.compression, file.path)
        for data in _cut(text if file.compression is None else _from(text, offset), unit, file, row):
            first, row, offset = row, row + data.count(b"\n"), offset + len(data)
            yield Piece(file, data, first, row, offset, stream.tell())


def rows(piece: Piece, options: SourceOptions) -> Iterator[tuple[int, str | Unusable]]:
    """The number and the text of each row of a piece, or why it has none."""
    data: bytes = piece.data
    if piece.row == 1:
        data = data.removeprefix(BOM)
    unit = _unit(piece.file, options)
    key = options.text_key if piece.file.kind == "jsonl" else None
    for row, value in _split(data, unit, piece.row):
        if key is None and unit != "file" and not value.strip():
            continue        # blank lines of a text separate documents, and are none
        try:
            yield row, text_of(value, key)
        except Unusable as problem:
            yield row, problem


def _unit(file: SourceFile, options: SourceOptions) -> str:
    return "line" if file.kind == "jsonl" else options.document


def _from(text: Iterator[bytes], offset: int) -> Iterator[bytes]:
    for block in text:
        if offset < len(block):
            yield block[offset:]
        offset = max(offset - len(block), 0)


def _cut(text: Iterator[bytes], unit: str, file: SourceFile, row: int) -> Iterator[bytes]:
    """The text in parts: each ends with the first row that ends after PIECE_BYTES."""
    held = bytearray()
    looked = PIECE_BYTES - 1    # no wanted end before this byte of what is held
    for block in text:
        held += block
        while (end := _end(held, looked, unit)) is not None:
            data = bytes(held[:end])
            del held[:end]
            looked = PIECE_BYTES - 1
            row += data.count(b"\n")
            yield data
        if len(held) > MOST_BYTES:
            raise UserError(f"{file.path}, row {row}: more than {MOST_BYTES >> 20} MiB in one document; cut it up"
                            + ", or take --document line or paragraph" * (unit == "file"))
        newline = held.rfind(b"\n", looked) if unit == "paragraph" else -1     # a blank line may end in the next block
        looked = max(looked, len(held) if newline < 0 else newline)
    if held or unit == "file":
        yield bytes(held)


def _end(held: bytearray, start: int, unit: str) -> int | None:
    if unit == "line":
        return held.find(b"\n", start) + 1 or None
    if unit == "paragraph" and (blank := BLANK.search(held, start)):
        return blank.end()
    return None


def _split(data: bytes, unit: str, row: int) -> Iterator[tuple[int, bytes]]:
    if unit == "file":
        yield row, data
    elif unit == "line":
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            yield row, line.removesuffix(b"\r")
            row += 1
    else:
        paragraph, first = [], row
        for line in [*data.split(b"\n"), b""]:
            if line.strip():
                first = first if paragraph else row
                paragraph.append(line)
            elif paragraph:
                yield first, b"\n".join(paragraph).removesuffix(b"\r")
                paragraph = []
            row += 1
