"""Parquet: the parent reads one column, batch by batch; workers make texts of its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen2_jax.data.rows import Unusable, text_of, usable
from qwen2_jax.data.source_files import PIECE_BYTES, Piece, SourceFile, SourceOptions, opened
from qwen2_jax.errors import UserError

BATCH = 1024    # rows decoded at a time


def pieces(file: SourceFile, options: SourceOptions, row: int, offset: int) -> Iterator[Piece]:
    """Pieces from row `row`. Raises UserError without pyarrow, for a damaged file, and for a column that is missing or
    holds no strings."""
    pa, parquet = _pyarrow()
    with opened(file) as stream:
        try:
            table = parquet.ParquetFile(stream)
            _check_column(table, options.text_key, file.path)
            total, held, size, first = table.metadata.num_rows, [], 0, row
            for value in _values(pa, table, options.text_key, row - 1):
                held.append(value)
                row += 1
                size += len(value or b"")
                if size >= PIECE_BYTES or len(held) == PIECE_BYTES:
                    yield Piece(file, held, first, row, 0, file.bytes * (row - 1) // total)
                    held, size, first = [], 0, row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.path} is damaged, or no Parquet file ({error}); get it anew or leave it out"
                            ) from None
        if held:
            yield Piece(file, held, first, row, 0, file.bytes)


def rows(piece: Piece, options: SourceOptions) -> Iterator[tuple[int, str | Unusable]]:
    """The number and the text of each row of a piece, or why it has none."""
    return usable(piece.data, text_of, piece.row)


def _values(pa: Any, table: Any, column: str, skip: int) -> Iterator[bytes | None]:
    for group in range(table.metadata.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if skip >= rows:
            skip -= rows
            continue
        for batch in table.iter_batches(BATCH, row_groups=[group], columns=[column]):
            array = batch.column(0)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            # As bytes, so that what is no UTF-8 is a bad row and not the end of the file.
            yield from array.slice(min(skip, len(array))).cast(pa.large_binary()).to_pylist()
            skip = max(skip - len(array), 0)


def _check_column(table: Any, key: str, path: str) -> None:
    pa, _ = _pyarrow()
    schema = table.schema_arrow
    if key not in schema.names:
        raise UserError(f"{path} has no column {key!r}, only {', '.join(schema.names)}; --text-key names the text's")
    kind = schema.field(key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_kind(kind) for is_kind in strings):
        raise UserError(f"{path}: column {key!r} holds {kind}, not strings; --text-key names another")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError('Parquet files need the package pyarrow: pip install "qwen2_jax[data]"') from None
    return pyarrow, parquet
