"""Which source each row of a mixture comes from: a function of the seed and the row's number, reached without a walk.

Rows are taken in blocks of M, a whole number of steps. In block k the M points (i + v_k) / M stand for the rows, and a
row's source is the one in whose share of [0, 1) its point lies: each source gets its exact share of every block, up to
one row, and v_k spreads the rest evenly over blocks. Which point is which row's is a permutation keyed by k. So the
number of rows that a source has given before block k is a sum of differences of ceilings, one array operation for all
blocks before.

Letters: K blocks, S sources, B rows of a batch, M rows of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qwen2_jax.data.draws import even_offsets, permutation
from qwen2_jax.errors import UserError

LEAST_ROWS = 256
"""Rows of a block at least. Weights that change with the step are taken at the first step of each block."""
SLAB = 1 << 16
"""Blocks counted at a time, to bound memory."""


@dataclass(frozen=True)
class Ramp:
    """A weight that changes with the step: straight lines between (step, weight) points, level before and after."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self):
        steps = [step for step, _ in self.points]
        if not steps or any(a >= b for a, b in itertools.pairwise(steps)) or steps[0] < 0:
            raise UserError(f"the points of a weight need steps from 0 on that increase, found {steps}")

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The weight at each of `steps`, float64."""
        at, weights = zip(*self.points, strict=True)
        return np.interp(steps, at, weights)


class Mixture:
    """Sources are numbered in the order of `weights`, which need not add up to one.

    Raises UserError for weights that are negative or not finite, or that are all 0 at some step.
    """

    def __init__(self, weights: Mapping[str, float | Ramp], batch_size: int, seed: int):
        _check(weights)
        self.weights = tuple(weights.values())
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_block = math.ceil(LEAST_ROWS / batch_size)
        self.rows_per_block = self.steps_per_block * batch_size
        self._counted = (0, np.zeros(len(self.weights), np.int64))     # a block, and each source's rows before it
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def rows_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of the step's batch its source [B] int32, and its number among the rows of that source [B]."""
        block, place = divmod(step, self.steps_per_block)
        here = slice(place * self.batch_size, (place + 1) * self.batch_size)
        sources_M, numbers_M = self._block(block)
        return sources_M[here], numbers_M[here]

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        bounds_S = self._bounds_KS(np.array([block]))[0]
        points_M = permutation(self.rows_per_block, "mixture", self.seed, block)
        sources_M = np.searchsorted(bounds_S, points_M, side="right")
        numbers_M = np.empty(self.rows_per_block, np.int64)
        for source, before in enumerate(self._rows_before(block)):
            own = np.flatnonzero(sources_M == source)
            numbers_M[own] = before + np.arange(len(own))
        return sources_M.astype(np.int32), numbers_M

    def _rows_before(self, block: int) -> np.ndarray:
        """Rows [S] of each source in all blocks before; goes on from the last block asked for where that is earlier."""
        at, rows_S = self._counted if self._counted[0] <= block else (0, np.zeros(len(self.weights), np.int64))
        for first in range(at, block, SLAB):
            bounds_KS = self._bounds_KS(np.arange(first, min(first + SLAB, block)))
            rows_S = rows_S + np.diff(bounds_KS, axis=1, prepend=0).sum(axis=0)
        self._counted = block, rows_S
        return rows_S

    def _bounds_KS(self, blocks: np.ndarray) -> np.ndarray:
        """Points of a block that belong to the sources up to and with each: the points (i + v) / M below its bound."""
        steps = blocks * self.steps_per_block
        weights_KS = np.stack([
            weight.at(steps) if isinstance(weight, Ramp) else np.full(len(steps), float(weight))
            for weight in self.weights
        ], axis=1)
        sums_KS = np.cumsum(weights_KS, axis=1)
        offsets_K1 = even_offsets(blocks, "mixture", self.seed)[:, None]
        return np.ceil(self.rows_per_block * (sums_KS / sums_KS[:, -1:]) - offsets_K1).astype(np.int64)


def _check(weights: Mapping[str, float | Ramp]) -> None:
    for name, weight in weights.items():
        for value in [w for _, w in weight.points] if isinstance(weight, Ramp) else [weight]:
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"the weight of source {name!r} must be a number from 0 on, found {value}")
    ramps = [weight for weight in weights.values() if isinstance(weight, Ramp)]
    constant = sum(weight for weight in weights.values() if not isinstance(weight, Ramp))
    # Between points the sum is a straight line, so it can be 0 only where it is 0 at a point.
    for step in sorted({step for ramp in ramps for step, _ in ramp.points} | {0}):
        if constant + sum(float(ramp.at(np.array(step))) for ramp in ramps) <= 0:
            raise UserError(f"the weights of all sources ({', '.join(weights) or 'none given'}) are 0 at step {step}: "
                            "at least one must be above 0")
