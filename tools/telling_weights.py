"""Random weights whose mistakes would show, by Hugging Face's tensor names.

At transformers' own initialisation biases are 0, norm scales 1, attention is flat, logits are tiny: wrong code passes.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

FAVOURITES = ("q_proj", "k_proj", "mlp.gate.weight", "lm_head", "score")


def scale_and_offset(name: str, shape: tuple[int, ...], *, tied: bool) -> tuple[float, float]:
    """Standard deviation and mean of the normal distribution that a tensor is drawn from.

    Attention and routing get clear favourites, logits a standard deviation above 1, norms scales off 1, biases values
    off 0. Embeddings are small, as trained ones are: only then does the norms' epsilon show. A tied table is also the
    head, and drawn as such.
    """
    if name.endswith("norm.weight"):
        return 0.3, 1.0
    if name.endswith("bias"):
        return 0.5, 0.0
    if "embed_tokens" in name:
        return (2 / math.sqrt(shape[-1]) if tied else 0.03), 0.0
    return (2 if any(part in name for part in FAVOURITES) else 1.5) / math.sqrt(shape[-1]), 0.0


def draw(name: str, out: np.ndarray, *, tied: bool) -> None:
    """Fill a contiguous float32 array; a name has the same numbers in every process."""
    scale, offset = scale_and_offset(name, out.shape, tied=tied)
    np.random.default_rng(zlib.crc32(name.encode())).standard_normal(out=out, dtype=np.float32)
    out *= np.float32(scale)
    out += np.float32(offset)
