"""Comparing two checkpoints of one model: every tensor, then what the models predict for fixed prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen2_jax.checkpoint.pieces import blocks
from qwen2_jax.checkpoint.source import Checkpoint
from qwen2_jax.errors import UserError

PROMPTS, PROMPT_TOKENS = 4, 16


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints differ by.

    `max_abs` is the largest |a - b| over all parameters, `tensor` where it is. `kl_mean` and `kl_max` are
    KL(src || dst) in nats a token, over all positions of the fixed prompts; for reward and score heads, which give no
    distribution, they are None and `score_gap` is the largest difference of scores.
    """

    max_abs: float
    tensor: str
    kl_mean: float | None
    kl_max: float | None
    score_gap: float | None

    def summary(self) -> str:
        weights = f"weights: largest difference {self.max_abs:.3g}" + (f" (in {self.tensor})" if self.max_abs else "")
        if self.score_gap is not None:
            return f"{weights}; scores: largest difference {self.score_gap:.3g}"
        return f"{weights}; predictions: KL {self.kl_mean:.3g} mean, {self.kl_max:.3g} largest, in nats a token"


def compare(src: Checkpoint, dst: Checkpoint, *, progress: bool = False) -> Comparison:
    """Compares tensors piece by piece, then loads one model after the other and runs the prompts.

    Rounding to the destination's dtype counts as difference but is no error. The second part needs memory for a model.

    Raises:
      UserError: a tensor of `dst` is not, bit for bit, that of `src` cast to its dtype.
    """
    max_abs, tensor = _compare_tensors(src, dst, progress=progress)
    a, b = (_predict(checkpoint) for checkpoint in (src, dst))
    if src.cfg.head != "lm":
        return Comparison(max_abs, tensor, None, None, float(np.abs(a - b).max()))
    kl = np.sum(np.exp(a) * (a - b), axis=-1, dtype=np.float64)
    return Comparison(max_abs, tensor, float(kl.mean()), float(kl.max()), None)


def _compare_tensors(src: Checkpoint, dst: Checkpoint, *, progress: bool) -> tuple[float, str]:
    largest, where = 0.0, src.slots[0].name
    total = sum(math.prod(slot.shape) * dst.reader.dtype(slot).itemsize for slot in dst.slots)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for slot in src.slots:
            dtype = dst.reader.dtype(slot)
            for start, stop in blocks(slot.shape, dtype):
                a, b = src.reader.rows(slot, start, stop), dst.reader.rows(slot, start, stop)
                if (a.astype(dtype, copy=False).view(np.uint8) != b.view(np.uint8)).any():
                    raise UserError(f"verification failed: {slot.name} was not written as it was read;"
                                    " the destination was removed, check the disk and convert again")
                if a.dtype != dtype:
                    with np.errstate(invalid="ignore"):  # infinities of both sides
                        gaps = np.abs(a.astype(np.float32) - b.astype(np.float32))
                    gap = float(np.max(gaps, initial=0.0, where=np.isfinite(gaps)))
                    if gap > largest:
                        largest, where = gap, slot.name
                bar.update(b.nbytes)
    return largest, where


def _predict(checkpoint: Checkpoint) -> np.ndarray:
    """Log-probabilities [B, T, V] at each position of the prompts, or scores [B, labels], float32."""
    import jax
    import jax.numpy as jnp

    from qwen2_jax.checkpoint.load import load_params
    from qwen2_jax.model.decoder import Decoder
    from qwen2_jax.model.heads import score
    from qwen2_jax.ops.dot import matmul

    cfg, stacked = checkpoint.cfg, jax.default_backend() != "cpu"
    shape = (PROMPTS, min(PROMPT_TOKENS, cfg.max_position))
    ids_BT = np.random.default_rng(0).integers(0, cfg.vocab, shape, dtype=np.int32)

    @jax.jit
    def predict(params, ids_BT):
        out: Any = Decoder(cfg, dtype=jnp.float32, stacked=stacked, train=False).apply({"params": params}, ids_BT)
        if cfg.head != "lm":
            return score(out.x_BTD[:, -1], out.head)
        return jax.nn.log_softmax(matmul(out.x_BTD, out.head["table"]))

    return np.asarray(predict(load_params(checkpoint, dtype="keep", stacked=stacked), ids_BT))
