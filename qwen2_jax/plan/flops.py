"""What the model's mathematics asks for, whatever a program does: arithmetic, and the bytes that decoding must read.

Training: 6 x parameters a token passes through, plus 12 x layers x heads x head width x (tokens before it, half of the
row on average); PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), with its full row halved for causality.
Recomputation does not count, nor what other documents in the same packed row would add. Parameters are those of
`shapes.count_params`: the shared expert and `top_k` of the routed ones, embedding and head, a tied table once.
"""

from __future__ import annotations

from typing import Literal

from qwen2_jax.config import ModelConfig
from qwen2_jax.shapes import count_params

Mode = Literal["train", "prefill", "decode"]


def model_flops(cfg: ModelConfig, mode: Mode, batch: int, seq: int) -> float:
    """Of one step on all devices: a training step or a prefill over `batch` rows of `seq` tokens; one more token for
    each of `batch` rows with `seq` tokens in the cache."""
    parameters = count_params(cfg).active
    attention = cfg.layers * cfg.heads * cfg.head_dim
    if mode == "decode":
        return batch * (2.0 * parameters + 4.0 * attention * seq)
    training = batch * seq * (6.0 * parameters + 12.0 * attention * seq / 2)
    return training if mode == "train" else training / 3
