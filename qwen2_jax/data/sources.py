"""Documents out of JSONL, plain text, Parquet, ArrayRecord and TFDS data sets, each with where it stands.

Two halves: `pieces` says where a file may be cut and runs in one process; `rows` takes the documents out of a piece and
runs in any. `documents` is both in one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType

from qwen2_jax.data.rows import BadRow, Document
from qwen2_jax.data.source_files import Piece, SourceFile, SourceOptions, find_files
from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)

READERS = {"jsonl": "text_source", "text": "text_source", "parquet": "parquet_source",
           "arrayrecord": "array_record_source", "tfds": "tfds_source"}
SHOWN = 20      # bad rows that are told one by one

Position = tuple[int, int, int]     # of a file in the list, of a row in it from 1, of that row's byte
START: Position = (0, 1, 0)


def documents(sources: Sequence[str], options: SourceOptions, *, max_bad_rows: int = 0) -> Iterator[Document]:
    """Every document of `sources` (paths, globs, folders, `gs://…`, `tfds:…`), in order.

    Raises UserError for sources that cannot be read, and for more than `max_bad_rows` rows without a document.
    """
    bad = BadRows(max_bad_rows)
    for piece, _ in pieces(find_files(sources, options), options):
        for row in rows(piece, options):
            if isinstance(row, BadRow):
                bad.add(row)
            else:
                yield row
    bad.summarize()


def pieces(files: Sequence[SourceFile], options: SourceOptions, start: Position = START
           ) -> Iterator[tuple[Piece, Position]]:
    """The pieces of all files from `start` on, each with the position behind it. What a piece holds depends on where it
    starts, and on the files alone."""
    for number, file in enumerate(files[start[0] :], start=start[0]):
        _, row, offset = start if number == start[0] else START
        held: Piece | None = None
        for piece in _reader(file).pieces(file, options, row, offset):
            if held is not None:
                yield held, (number, held.next_row, held.next_offset)
            held = piece
        if held is not None:
            yield held, (number + 1, *START[1:])
        elif row == 1:
            log.warning("%s has no rows", file.path)


def rows(piece: Piece, options: SourceOptions) -> Iterator[Document | BadRow]:
    """The documents of a piece, and the rows that give none. Raises UserError for a damaged file."""
    file = piece.file
    for row, text in _reader(file).rows(piece, options):
        yield Document(text, file.path, row) if isinstance(text, str) else BadRow(file.path, row, str(text))


class BadRows:
    """Counts rows that give no document, tells of the first ones, and refuses one more than the limit."""

    def __init__(self, limit: int, count: int = 0):
        self.limit, self.count, self._silent = limit, count, 0

    def add(self, row: BadRow) -> None:
        if self.count >= self.limit:
            raise UserError(f"{row}; {self.count + 1} bad row{'s' * (self.count > 0)}, and --max-bad-rows is "
                            f"{self.limit}: mend the data, or allow more")
        self.count += 1
        if self.count <= SHOWN:
            log.warning("%s: skipped", row)
        else:
            self._silent += 1

    def summarize(self) -> None:
        if self._silent:
            log.warning("%d more bad rows skipped", self._silent)


def _reader(file: SourceFile) -> ModuleType:
    return importlib.import_module(f"qwen2_jax.data.{READERS[file.kind]}")
