"""ArrayRecord, read by the package that comes with Grain: the parent hands out ranges of records, workers read them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from qwen2_jax.data.rows import Unusable, text_of, usable
from qwen2_jax.data.source_files import GS, PIECE_BYTES, Piece, SourceFile, SourceOptions, check_unchanged
from qwen2_jax.errors import UserError


def pieces(file: SourceFile, options: SourceOptions, row: int, offset: int) -> Iterator[Piece]:
    """Ranges of records from record `row`. Raises UserError for a damaged file, and for one that is not local."""
    check_unchanged(file)
    yield from ranges(file, _reader(file).num_records(), row)
    check_unchanged(file)


def rows(piece: Piece, options: SourceOptions) -> Iterator[tuple[int, str | Unusable]]:
    """The number and the text of each record of a piece, or why it has none."""
    key = options.text_key
    text = {"json": functools.partial(text_of, key=key), "text": text_of,
            "example": functools.partial(_text_of_example, key=key)}[options.records]
    try:
        records = _reader(piece.file).read(*piece.data)
    except RuntimeError as error:
        raise _damaged(piece.file.path, error) from None
    return usable(records, text, piece.row)


def ranges(file: SourceFile, records: int, row: int) -> Iterator[Piece]:
    """`records` from number `row` on, in parts of about PIECE_BYTES as they are stored."""
    size = max(1, PIECE_BYTES * records // max(file.bytes, 1))
    for start in range(row - 1, records, size):
        stop = min(start + size, records)
        yield Piece(file, (start, stop), start + 1, stop + 1, 0, file.bytes * stop // records)


@functools.lru_cache(maxsize=2)     # pieces of one file come one after the other
def _reader(file: SourceFile) -> Any:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    if file.path.startswith(GS):
        raise UserError(f"{file.path}: ArrayRecord is read from local files only; copy it, or mount the bucket")
    reader = array_record_module.ArrayRecordReader(file.path)
    if not reader.ok():     # a file that is cut short has lost its index, and looks empty
        raise _damaged(file.path, "it has no index")
    return reader


def _damaged(path: str, problem: object) -> UserError:
    return UserError(f"{path} is damaged, or no ArrayRecord file ({problem}); get it anew or leave it out")


def _text_of_example(record: bytes, key: str) -> str:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        example = tf_example_generated_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError:
        raise Unusable("no tf.train.Example") from None
    features = example.features.feature
    if key not in features:
        raise Unusable(f"no feature {key!r}, only {', '.join(map(repr, sorted(features)))}"[:200])
    values = features[key].bytes_list.value
    if len(values) != 1:
        raise Unusable(f"feature {key!r} holds {len(values)} strings instead of one")
    return text_of(values[0])
