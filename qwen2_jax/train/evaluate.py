"""How well a model predicts documents: every token scored once, in overlapping windows that give it context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.errors import UserError
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, per_device, place
from qwen2_jax.train.loop import Hook
from qwen2_jax.train.losses import LossSums, NextTokenLoss


class Window(NamedTuple):
    """Pairs (token, next token) `start` to `stop` of a document, of which those from `counted` on are scored."""

    document: int
    start: int
    counted: int
    stop: int


def windows(document_lengths: Sequence[int], row_length: int, stride: int) -> list[Window]:
    """Windows of at most `row_length` pairs that score each pair of each document once.

    The first window of a document scores all its pairs; each later one the next `stride`, with the row's other
    positions as context. Documents of fewer than two tokens have no pair.
    """
    if not 1 <= stride <= row_length:
        raise UserError(f"stride must lie between 1 and the row length {row_length}, found {stride}")
    found = []
    for document, tokens in enumerate(document_lengths):
        done, pairs = 0, tokens - 1
        while done < pairs:
            stop = min(pairs, done + stride) if done else min(pairs, row_length)
            found.append(Window(document, max(0, stop - row_length), done, stop))
            done = stop
    return found


def make_evaluation(loss: NextTokenLoss, documents: Sequence[np.ndarray], *, row_length: int, stride: int,
                    batch_size: int, mesh: Mesh | None = None) -> Callable[[dict], tuple[float, int]]:
    """`evaluate(params) -> (nll, count)`: nats summed over all tokens but the first of each document, and their number.

    Give documents a first token that stands for "a document starts here", and all their own tokens are scored. Sums are
    float32 a batch and float64 over batches.
    """
    plan = windows([len(document) for document in documents], row_length, stride)
    # Equally long windows side by side would need no padding, but one compiled shape is worth more here.
    sums = jax.jit(per_device(loss.sums, mesh, (loss.param_specs(mesh), TOKENS_SPEC), REPLICATED))

    def evaluate(params: dict) -> tuple[float, int]:
        parts: list[LossSums] = [sums(params, place(batch, mesh, TOKENS_SPEC))
                                 for batch in _batches(plan, documents, row_length, batch_size)]
        return math.fsum(float(p.nll) for p in parts), round(math.fsum(float(p.count) for p in parts))

    return evaluate


def held_out_losses(loss: NextTokenLoss, sources: Mapping[str, Any], documents: int, *, row_length: int,
                    batch_size: int, mesh: Mesh | None = None) -> Callable[[dict], dict[str, Any]]:
    """`evaluate(params)` → {"nll": nats a token over all, "tokens", "sources": {name: {"nll", "tokens"}}} of the first
    `documents` documents of each source (`lengths`, `tokens(document, start, stop)`)."""
    def first(source: Any) -> list[np.ndarray]:
        return [source.tokens(i, 0, int(n)) for i, n in enumerate(source.lengths[:documents])]

    each = {name: make_evaluation(loss, first(source), row_length=row_length, stride=max(1, row_length // 2),
                                  batch_size=batch_size, mesh=mesh) for name, source in sources.items()}

    def evaluate(params: dict) -> dict[str, Any]:
        found = {name: one(params) for name, one in each.items()}
        nats, tokens = (sum(values) for values in zip((0.0, 0), *found.values(), strict=True))
        return {"nll": nats / max(tokens, 1), "tokens": tokens,
                "sources": {name: {"nll": n / max(t, 1), "tokens": t} for name, (n, t) in found.items()}}

    return evaluate


class Evaluate(Hook):
    """Every `every` updates, and after the last, calls `evaluate(params)` and hands `(step, result)` to `report`."""

    def __init__(self, evaluate: Callable, report: Callable, *, every: int, close: Callable[[], None] = lambda: None):
        self.evaluate, self.report, self.every, self.close = evaluate, report, every, close

    def due(self, step, last):
        return last or step % self.every == 0

    def after_step(self, step, state):
        self.report(step, self.evaluate(state.params))


def _batches(plan: list[Window], documents: Sequence[np.ndarray], row_length: int,
             batch_size: int) -> Iterator[PackedBatch]:
    for first in range(0, len(plan), batch_size):
        shape = (batch_size, row_length)
        ids_BT, targets_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(4))
        weights_BT = np.zeros(shape, np.float32)
        for b, window in enumerate(plan[first:first + batch_size]):
            tokens, n = documents[window.document], window.stop - window.start
            ids_BT[b, :n] = tokens[window.start:window.stop]
            targets_BT[b, :n] = tokens[window.start + 1:window.stop + 1]
            segments_BT[b, :n] = 1
            positions_BT[b, :n] = np.arange(n)
            weights_BT[b, window.counted - window.start:n] = 1
        yield PackedBatch(ids_BT, targets_BT, segments_BT, positions_BT, weights_BT)
