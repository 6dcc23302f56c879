"""Pack documents of tokens into rows of equal length: each token after a document's first is a target exactly once.

Shape letters: B rows of a batch, T positions of a row.

A document of n tokens holds n - 1 pairs (input, target): token i and token i + 1. Rows are filled with pairs, not with
tokens. So a document that is cut between rows loses nothing: the last target of one piece is the first input of the
next. And no pair reaches from one document into another.

The plan (which pairs lie in which row) needs the lengths only, and is kept apart from the rows themselves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qwen2_jax.errors import UserError


@dataclass(frozen=True)
class PackedBatch:
    """Rows for one step. At padding everything is 0.

    `ids_BT`, `targets_BT` int32: the input, and the token that follows it. `segments_BT` int32: 1, 2, … for the pieces
    of a row. `positions_BT` int32: from 0 in each segment. `weights_BT` float32: 1 where the target counts.
    `sources_BT` int32: the number of the source that a row comes from, where there are several to be told apart.
    """

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    weights_BT: np.ndarray
    sources_BT: np.ndarray | None = None


class Piece(NamedTuple):
    """Pairs `start` to `start + length` of a document."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of each row, in the order in which they lie there."""

    row_length: int
    rows: tuple[tuple[Piece, ...], ...]


def plan_rows(document_lengths: Sequence[int], row_length: int) -> PackingPlan:
    """Decide which pairs lie in which row: best fit, longest first.

    A document is cut only when it is longer than a row: full rows from its start, then the rest, which goes into the
    fullest row that has room for all of it. `document_lengths` are in tokens; a document of fewer than two tokens has
    no pair and appears nowhere. The plan depends on nothing but the arguments.
    """
    if row_length < 1:
        raise UserError(f"the row length must be at least 1 token, found {row_length}")
    pieces = (Piece(document, 0, tokens - 1) for document, tokens in enumerate(document_lengths) if tokens > 1)
    full, rests = _cut_into_rows(pieces, row_length)
    rows = [[piece] for piece in full]
    room = _Room()
    for piece in rests:
        found = room.least(piece.length)
        if found is None:
            rows.append([])
            found = row_length, len(rows) - 1
        free, row = found
        rows[row].append(piece)
        room.add(free - piece.length, row)
    return PackingPlan(row_length, tuple(map(tuple, rows)))


def pack_exactly(pieces: Iterable[Piece], sizes: Sequence[int]) -> list[list[Piece]]:
    """Pack pieces into rows of the given sizes, of which none has a free position afterwards.

    Best fit, longest first, as in `plan_rows`; what has room nowhere as a whole is cut to fill the free places, the
    largest first. The lengths of the pieces must add up to those of the rows.
    """
    longest = max(sizes)
    rows: list[list[Piece]] = [[] for _ in sizes]
    room = _Room()
    unopened = []       # rows of full length, the first one last
    for row, size in reversed(list(enumerate(sizes))):
        if size == longest:
            unopened.append(row)
        else:
            room.add(size, row)
    over = []
    full, rests = _cut_into_rows(pieces, longest)
    for piece in [*full, *rests]:
        if found := room.least(piece.length):
            free, row = found
        elif unopened:
            free, row = longest, unopened.pop()
        else:
            over.append(piece)
            continue
        rows[row].append(piece)
        room.add(free - piece.length, row)
    for row in unopened:
        room.add(longest, row)
    for document, start, length in over:
        while length:
            free, row = room.least(length) or room.most()
            taken = min(free, length)
            rows[row].append(Piece(document, start, taken))
            room.add(free - taken, row)
            start, length = start + taken, length - taken
    return rows


def _cut_into_rows(pieces: Iterable[Piece], row_length: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces of full rows from the start of each piece, and what is left of it, longest first."""
    full: list[Piece] = []
    rests: list[Piece] = []
    for piece in pieces:
        document, start, length = piece
        if length < row_length:
            rests.append(piece)
            continue
        end = start + length
        full += (Piece(document, at, row_length) for at in range(start, end - row_length + 1, row_length))
        if rest := length % row_length:
            rests.append(Piece(document, end - rest, rest))
    rests.sort(key=lambda piece: -piece.length)
    return full, rests


class _Room:
    """Rows by their number of free positions. What `least` and `most` return is taken out; at equal room it is the
    row that was added last."""

    def __init__(self):
        self._rows: dict[int, list[int]] = {}   # free positions → rows with so many
        self._sizes: list[int] = []             # the keys, ascending

    def add(self, free: int, row: int) -> None:
        if free:
            if free not in self._rows:
                self._rows[free] = []
                insort(self._sizes, free)
            self._rows[free].append(row)

    def least(self, length: int) -> tuple[int, int] | None:
        """(free positions, row) of the fullest row with room for `length`."""
        at = bisect_left(self._sizes, length)
        return self._take(at) if at < len(self._sizes) else None

    def most(self) -> tuple[int, int]:
        """(free positions, row) of the emptiest row."""
        return self._take(len(self._sizes) - 1)

    def _take(self, at: int) -> tuple[int, int]:
        free = self._sizes[at]
        row = self._rows[free].pop()
        if not self._rows[free]:
            del self._rows[free], self._sizes[at]
        return free, row


def fill_rows(rows: Sequence[Sequence[np.ndarray]], row_length: int) -> PackedBatch:
    """Rows of pieces, each piece its tokens and the one that follows them, as arrays; an empty row is padding."""
    shape = (len(rows), row_length)
    ids_BT, targets_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(4))
    weights_BT = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, tokens in enumerate(row, start=1):
            length = len(tokens) - 1
            here = slice(at, at + length)
            ids_BT[b, here] = tokens[:-1]
            targets_BT[b, here] = tokens[1:]
            segments_BT[b, here] = segment
            positions_BT[b, here] = np.arange(length)
            at += length
        weights_BT[b, :at] = 1
    return PackedBatch(ids_BT, targets_BT, segments_BT, positions_BT, weights_BT)


class PackedDocuments:
    """Documents packed into rows, read as batches by number.

    Documents are sequences of token ids, each with its end token at its end. Raises UserError when no document has
    two tokens, or when an id does not fit int32.
    """

    def __init__(self, documents: Sequence[Sequence[int] | np.ndarray], row_length: int):
        self.documents = [_int32(i, document) for i, document in enumerate(documents)]
        self.plan = plan_rows([len(document) for document in self.documents], row_length)
        if not self.plan.rows:
            raise UserError("nothing to train on: no document has at least two tokens, its end token included")

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.plan.rows)

    @property
    def targets(self) -> int:
        """Targets of one epoch, over all rows."""
        return sum(piece.length for row in self.plan.rows for piece in row)

    def batch(self, n: int, batch_size: int, *, seed: int) -> PackedBatch:
        """Batch `n` of an endless stream: a function of `seed` and `n` alone.

        The stream is epoch after epoch, each in an order of its own; a batch may hold the end of one and the start of
        the next, so that every row comes once in each epoch whatever the batch size.
        """
        _check_batch(n, batch_size)
        wanted = (divmod(i, len(self)) for i in range(n * batch_size, (n + 1) * batch_size))
        return self._filled([int(_order(seed, epoch, len(self))[i]) for epoch, i in wanted])

    def one_epoch(self, batch_size: int) -> Iterator[PackedBatch]:
        """All rows once, in the order of the plan, for evaluation; the last batch is filled up with rows of padding."""
        _check_batch(0, batch_size)
        for start in range(0, len(self), batch_size):
            rows: list[int | None] = list(range(start, min(start + batch_size, len(self))))
            yield self._filled(rows + [None] * (batch_size - len(rows)))

    def _filled(self, rows: Sequence[int | None]) -> PackedBatch:
        """The given rows of the plan; None is a row of padding."""
        pieces = [() if row is None else self.plan.rows[row] for row in rows]
        return fill_rows([[self.documents[d][start:start + length + 1] for d, start, length in row] for row in pieces],
                         self.plan.row_length)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _check_batch(n: int, batch_size: int) -> None:
    if batch_size < 1 or n < 0:
        raise UserError(f"a batch needs a size from 1 and a number from 0 on, found size {batch_size}, number {n}")


def _int32(i: int, document: Sequence[int] | np.ndarray) -> np.ndarray:
    tokens = np.asarray(document, dtype=np.int64 if len(document) == 0 else None)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"document {i} must be a list of token ids, found shape {tokens.shape} of {tokens.dtype}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(np.int32).max:
        worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise UserError(f"document {i} holds token id {worst}, outside 0 to 2^31 - 1")
    return tokens.astype(np.int32)
