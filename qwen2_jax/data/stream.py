"""The endless stream of training batches out of prepared tokens, each reached by its number.

Batch n is a function of the seed, n, the content of the sources, their weights, the row length and the batch size, and
of nothing else: not of hosts, workers, what was read before, the machine, or the version of a library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from qwen2_jax.data.mixture import Mixture, Ramp
from qwen2_jax.data.packing import PackedBatch, Piece, fill_rows
from qwen2_jax.data.shards import TokenShards
from qwen2_jax.data.source_rows import SourceRows
from qwen2_jax.errors import UserError

FORMAT = 1
"""Raised when the same arguments give other batches than before."""
MOST_SEED = 2**63 - 1


class Stream:
    """Batches 0, 1, 2, … from one or more sources, whose rows are mixed by weight.

    All rows are full. In each epoch of a source each token after a document's first is a target exactly once; its end
    flows into its next epoch. `weights` are shares of the rows and need not add up to one; by default they are the
    sources' sizes, so that all come to their ends together.

    Raises UserError when there is nothing to train on, or an argument cannot be used.
    """

    def __init__(self, sources: Mapping[str, TokenShards], *, row_length: int, batch_size: int, seed: int,
                 weights: Mapping[str, float | Ramp] | None = None):
        _check(sources, row_length, batch_size, seed)
        self.sources, self.row_length, self.batch_size, self.seed = dict(sources), row_length, batch_size, seed
        self._given_weights = weights
        self._shards = list(self.sources.values())
        self._rows = [SourceRows(source.lengths, row_length, seed, number)
                      for number, source in enumerate(self._shards)]
        if weights is None:
            weights = {name: rows.pairs for name, rows in zip(self.sources, self._rows, strict=True)}
        elif set(weights) != set(self.sources):
            raise UserError(f"each source needs a weight: the sources are {', '.join(self.sources)}, "
                            f"weights were given for {', '.join(weights)}")
        self._mixture = Mixture({name: weights[name] for name in self.sources}, batch_size, seed)

    def __reduce__(self):
        # Workers get the arguments and make their own plans.
        return partial(Stream, row_length=self.row_length, batch_size=self.batch_size, seed=self.seed,
                       weights=self._given_weights), (self.sources,)

    def batch(self, n: int, rows: slice = slice(None)) -> PackedBatch:
        """Batch `n`, or of it the given rows alone, for which alone tokens are read; with `sources_BT`."""
        chosen = self.plan(n, rows)
        batch = fill_rows([[self._shards[source].tokens(document, start, start + length + 1)
                            for document, start, length in pieces] for source, pieces in chosen], self.row_length)
        sources_B1 = np.array([[source] for source, _ in chosen], np.int32)
        return replace(batch, sources_BT=np.repeat(sources_B1, self.row_length, axis=1))

    def plan(self, n: int, rows: slice = slice(None)) -> list[tuple[int, Sequence[Piece]]]:
        """For each of the rows the number of its source, and the pieces of documents that lie in it."""
        chosen = range(self.batch_size)[rows]
        if n < 0 or rows.step is not None or not chosen or (rows.stop or 0) > self.batch_size:
            raise ValueError(f"no rows {rows} in batch {n} of {self.batch_size} rows")
        sources_B, numbers_B = (of_B[rows].tolist() for of_B in self._mixture.rows_of(n))
        return [(source, self._rows[source].row(number)) for source, number in zip(sources_B, numbers_B, strict=True)]

    def identity(self) -> dict[str, Any]:
        """All that the batches depend on, as JSON: what another stream must share to give the same ones."""
        weights = [[list(point) for point in weight.points] if isinstance(weight, Ramp) else float(weight)
                   for weight in self._mixture.weights]
        return {
            "format": FORMAT, "seed": self.seed, "row_length": self.row_length, "batch_size": self.batch_size,
            "sources": [{"manifest_hash": source.manifest_hash, "weight": weight}
                        for source, weight in zip(self._shards, weights, strict=True)],
        }

    @property
    def blocks_planned(self) -> int:
        """How many packing plans were made so far: what reaching a batch costs."""
        return sum(rows.blocks_planned for rows in self._rows)


def _check(sources: Mapping[str, TokenShards], row_length: int, batch_size: int, seed: int) -> None:
    for what, value in (("row length", row_length), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"the {what} must be at least 1, found {value}")
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"the seed must be from 0 to 2^63 - 1, found {seed}")
    if not sources:
        raise UserError("nothing to train on: no source is given")
    first = next(iter(sources))
    for name, source in sources.items():
        if (source.vocab, source.end_token) != (sources[first].vocab, sources[first].end_token):
            raise UserError(f"sources {first!r} and {name!r} were prepared with different tokenizers: their "
                            f"vocabularies have {sources[first].vocab:,} and {source.vocab:,} tokens, their end tokens "
                            f"are {sources[first].end_token} and {source.end_token}")
        if not (source.lengths > 1).any():
            raise UserError(f"source {name!r} has nothing to train on: none of its {len(source.lengths):,} documents "
                            "has two tokens, its end token included")
