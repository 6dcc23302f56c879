"""Rows 0, 1, 2, … of one source: without end, without padding, each reached without those before it.

The pairs (see `packing.py`) of epoch 0, 1, 2, … stand one after the other, each epoch's in an order of its own, and R
rows of T tokens, a block, take the next R * T of them. So a row's number says which block, which epoch and which pairs
are meant, and only the block's documents have to be looked at. Inside the block a plan puts them into rows, cutting no
more documents than it must. A row in which an epoch ends begins the next one.

What is shuffled are sections: single documents, of long ones a few rows' worth; of very many documents several
neighbours. Then the rows of each block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qwen2_jax.data.draws import permutation
from qwen2_jax.data.packing import Piece, pack_exactly

BLOCK_ROWS, BLOCK_PAIRS = 256, 1 << 21
"""A block has at least so many rows and pairs where an epoch has them: the more, the fewer documents are cut."""
SECTION_ROWS = 4
"""Rows' worth of a long document that stay together."""
MOST_SECTIONS = 1 << 20
"""Sections an epoch, about; each takes some bytes of memory and 0.1 μs an epoch."""


class SourceRows:
    """`lengths`: tokens of each document, its end token included; at least one has two. `key`: of all draws."""

    def __init__(self, lengths: np.ndarray, row_length: int, *key: str | int):
        self._lengths, self._row_length, self._key = lengths, row_length, key
        self._group = math.ceil(len(lengths) / MOST_SECTIONS)   # documents of a chunk
        pairs_C = np.add.reduceat(_pairs(lengths), np.arange(0, len(lengths), self._group), dtype=np.int64)
        self.pairs = int(pairs_C.sum())
        """Pairs of an epoch."""
        # A section is a chunk's pairs from `begin` to `end`.
        longest = row_length * max(SECTION_ROWS, math.ceil(self.pairs / (row_length * MOST_SECTIONS)))
        sections_C = -(-pairs_C // longest)     # none for a chunk without pairs
        self._chunk_S = np.repeat(np.arange(len(pairs_C)), sections_C)
        place_S = np.arange(len(self._chunk_S)) - np.repeat(np.cumsum(sections_C) - sections_C, sections_C)
        self._begin_S = place_S * longest
        self._end_S = np.minimum(self._begin_S + longest, pairs_C[self._chunk_S])
        wanted = max(BLOCK_ROWS, math.ceil(BLOCK_PAIRS / row_length))
        self._block_rows = max(1, min(wanted, self.pairs // row_length))
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self._block = lru_cache(maxsize=2)(self._plan)

    def row(self, number: int) -> Sequence[Piece]:
        """The pieces of a row, in the order in which they lie there."""
        block, place = divmod(number, self._block_rows)
        return self._block(block)[place]

    @property
    def blocks_planned(self) -> int:
        return self._block.cache_info().misses

    def _plan(self, block: int) -> list[list[Piece]]:
        row_length = self._row_length
        at, stop = (n * self._block_rows * row_length for n in (block, block + 1))
        rows: list[list[Piece]] = []
        while at < stop:
            epoch, begin = divmod(at, self.pairs)
            end = min(self.pairs, begin + stop - at)
            # The rest of the row in which the epoch before ended, whole rows, the start of the row that the next fills.
            head = min(-at % row_length, end - begin)
            whole, tail = divmod(end - begin - head, row_length)
            sizes = [size for size in (head, *[row_length] * whole, tail) if size]
            packed = pack_exactly(self._pieces(epoch, begin, end), sizes)
            if head:
                rows[-1] += packed.pop(0)
            rows += (packed[i] for i in permutation(whole, "rows", *self._key, epoch, block))
            if tail:
                rows.append(packed[-1])
            at += end - begin
        return rows

    def _pieces(self, epoch: int, begin: int, end: int) -> list[Piece]:
        """The pieces that hold the pairs from `begin` to `end` in the epoch's order."""
        order_S, ends_S = self._order(epoch)
        first, last = np.searchsorted(ends_S, begin, side="right"), np.searchsorted(ends_S, end, side="left")
        sections = order_S[first:last + 1]
        from_N, to_N = self._begin_S[sections], self._end_S[sections]
        to_N[-1] -= ends_S[last] - end
        from_N[0] += begin - (ends_S[first - 1] if first else 0)
        # [sections, documents of a chunk]; the last chunk may be short of documents.
        documents_NG = self._chunk_S[sections][:, None] * self._group + np.arange(self._group)
        known_NG = np.minimum(documents_NG, len(self._lengths) - 1)
        pairs_NG = np.where(documents_NG == known_NG, _pairs(self._lengths[known_NG]), 0)
        start_NG = np.cumsum(pairs_NG, axis=1) - pairs_NG
        from_NG = np.clip(from_N[:, None] - start_NG, 0, pairs_NG)
        length_NG = np.clip(to_N[:, None] - start_NG, 0, pairs_NG) - from_NG
        held = length_NG > 0
        return list(map(Piece, *(a[held].tolist() for a in (documents_NG, from_NG, length_NG))))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sections in the epoch's order, and for each the pairs up to and with it."""
        order_S = permutation(len(self._chunk_S), "sections", *self._key, epoch)
        return order_S, np.cumsum((self._end_S - self._begin_S)[order_S])


def _pairs(lengths: np.ndarray) -> np.ndarray:
    return np.maximum(lengths, 1).astype(np.int64) - 1
