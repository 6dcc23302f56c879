"""SwiGLU feed-forward block, without biases."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.params import normal, weight
from qwen2_jax.ops.dot import linear, matmul
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.split import Split


def swiglu(x_xD, gate_FD, up_FD, down_DF):
    """down(silu(gate x) * up x); the product of the two branches is taken in float32 and rounded once."""
    h_xF = jax.nn.silu(matmul(x_xD, gate_FD)) * matmul(x_xD, up_FD)
    return linear(h_xF.astype(x_xD.dtype), down_DF)


class Mlp(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x_BtD):
        D, F, init = self.cfg.d_model, self.cfg.d_ff, normal(self.cfg.init_std)
        split = Split.of(self.cfg, self.ax, "ffn")
        y_BTD = swiglu(split.enter(x_BtD),
                       weight(self, "gate", (F, D), ("ffn", "embed"), init),
                       weight(self, "up", (F, D), ("ffn", "embed"), init),
                       weight(self, "down", (D, F), ("embed", "ffn"), init))
        return split.leave(y_BTD)
