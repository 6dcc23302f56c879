"""Pack documents of tokens into rows of equal length: each token after a document's first is a target exactly once.

Shape letters: B rows of a batch, T positions of a row.

A document of n tokens holds n - 1 pairs (input, target): token i and token i + 1. Rows are filled with pairs, not with
tokens. So a document that is cut between rows loses nothing: the last target of one piece is the first input of the
next. And no pair reaches from one document into another.

The plan (which pairs lie in which row) needs the lengths only, and is kept apart from the rows themselves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qwen2_jax.errors import UserError


@dataclass(frozen=True)
class PackedBatch:
    """Rows for one step. At padding everything is 0.

    `ids_BT`, `targets_BT` int32: the input, and the token that follows it. `segments_BT` int32: 1, 2, … for the pieces
    of a row. `positions_BT` int32: from 0 in each segment. `weights_BT` float32: 1 where the target counts.
    """

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    weights_BT: np.ndarray


@dataclass(frozen=True)
class Piece:
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
    rows: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, tokens in enumerate(document_lengths):
        pairs = max(tokens - 1, 0)
        whole = pairs - pairs % row_length
        rows += ([Piece(document, start, row_length)] for start in range(0, whole, row_length))
        if pairs > whole:
            rests.append(Piece(document, whole, pairs - whole))
    rests.sort(key=lambda piece: -piece.length)
    open_rows: dict[int, list[int]] = {}  # free positions → rows with so many
    sizes: list[int] = []  # the keys of open_rows, ascending
    for piece in rests:
        at = bisect_left(sizes, piece.length)
        if at == len(sizes):
            row, free = len(rows), row_length
            rows.append([])
        else:
            free = sizes[at]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free], sizes[at]
        rows[row].append(piece)
        if left := free - piece.length:
            if left not in open_rows:
                open_rows[left] = []
                insort(sizes, left)
            open_rows[left].append(row)
    return PackingPlan(row_length, tuple(map(tuple, rows)))


def fill_rows(plan: PackingPlan, documents: Sequence[np.ndarray], rows: Sequence[int | None]) -> PackedBatch:
    """The given rows of a plan as arrays, in that order; None is a row of padding."""
    shape = (len(rows), plan.row_length)
    ids_BT, targets_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(4))
    weights_BT = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, piece in enumerate(() if row is None else plan.rows[row], start=1):
            tokens = documents[piece.document][piece.start : piece.start + piece.length + 1]
            here = slice(at, at + piece.length)
            ids_BT[b, here] = tokens[:-1]
            targets_BT[b, here] = tokens[1:]
            segments_BT[b, here] = segment
            positions_BT[b, here] = np.arange(piece.length)
            weights_BT[b, here] = 1
            at += piece.length
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
        rows = [int(_order(seed, epoch, len(self))[i]) for epoch, i in wanted]
        return fill_rows(self.plan, self.documents, rows)

    def one_epoch(self, batch_size: int) -> Iterator[PackedBatch]:
        """All rows once, in the order of the plan, for evaluation; the last batch is filled up with rows of padding."""
        _check_batch(0, batch_size)
        for start in range(0, len(self), batch_size):
            rows: list[int | None] = list(range(start, min(start + batch_size, len(self))))
            yield fill_rows(self.plan, self.documents, rows + [None] * (batch_size - len(rows)))


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
