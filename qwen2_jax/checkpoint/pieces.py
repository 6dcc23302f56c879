"""How weights move: in pieces of bounded size, read ahead by threads, between any reader and any writer."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from qwen2_jax.checkpoint.names import Slot

PIECE_BYTES = 16 * 2**20
PART_BYTES = 2**20
"""Of a piece on disk, what can be read without the rest: what a device of a large mesh wants is a small part of it."""
AHEAD = 3


class Reader(Protocol):
    """Weights at rest. Safe to call from several threads."""

    def dtype(self, slot: Slot) -> np.dtype: ...

    def rows(self, slot: Slot, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor's first axis, of a matrix only `columns` where that is given, in its stored
        dtype. Raises UserError for damaged files."""
        ...


class Writer(Protocol):
    """Weights being written; complete once every row has been given and `close` has returned.

    `close` is called after an error too, and returns or raises only when nothing is being written any more.
    """

    def write(self, slot: Slot, start: int, piece: np.ndarray) -> None: ...

    def close(self) -> None: ...


def block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows a piece: as many as fit PIECE_BYTES, preferring a count that divides the tensor evenly.

    Even pieces are what Zarr stores without padding and what a mesh axis divides.
    """
    row = max(1, math.prod(shape[1:]) * dtype.itemsize)
    count = math.ceil(shape[0] / max(1, PIECE_BYTES // row))
    even = next((n for n in range(count, 2 * count) if shape[0] % n == 0), count)
    return math.ceil(shape[0] / even)


def part_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows a part of a piece: a divisor of `block_rows`, about PART_BYTES of them."""
    piece, row = block_rows(shape, dtype), max(1, math.prod(shape[1:]) * dtype.itemsize)
    divisors = [n for n in range(1, piece + 1) if piece % n == 0]
    fitting = [n for n in divisors if n * row <= PART_BYTES]
    if fitting and fitting[-1] * row * 8 > PART_BYTES:
        return fitting[-1]
    return next((n for n in divisors if n * row > PART_BYTES), piece)     # too large rather than thousands of crumbs


def blocks(shape: tuple[int, ...], dtype: np.dtype) -> list[tuple[int, int]]:
    """Row ranges [start, stop) that cut a tensor into pieces of `block_rows`."""
    step = block_rows(shape, dtype)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def read_ahead(reader: Reader, slots: Sequence[Slot], dtypes: Sequence[np.dtype]
               ) -> Iterator[tuple[Slot, int, np.ndarray]]:
    """(slot, first row, piece) over whole tensors in order, each cast to its dtype; a few pieces are read ahead.

    Pieces are cut by the dtype asked for, so that they match the chunks of a Zarr array written in it.
    """
    wanted: Iterable[tuple[Slot, int, int, np.dtype]] = (
        (slot, start, stop, dtype) for slot, dtype in zip(slots, dtypes, strict=True)
        for start, stop in blocks(slot.shape, dtype))

    def read(slot: Slot, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        return reader.rows(slot, start, stop).astype(dtype, copy=False)

    todo = iter(wanted)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="read-weights") as pool:
        waiting = collections.deque((item, pool.submit(read, *item)) for item in itertools.islice(todo, AHEAD))
        try:
            while waiting:
                (slot, start, _, _), future = waiting.popleft()
                piece = future.result()
                waiting.extend((item, pool.submit(read, *item)) for item in itertools.islice(todo, 1))
                yield slot, start, piece
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
