"""SwiGLU feed-forward block, without biases."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.params import matrix, normal
from qwen2_jax.ops.dot import linear
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.split import Split


def swiglu(x_xD, gate_FD, up_FD, down_DF, scale_x1=None):
    """down(silu(gate x) * up x) times float32 `scale_x1`; the product of the two branches is taken in float32."""
    x_RD = x_xD.reshape(-1, x_xD.shape[-1])     # rows in one dimension: XLA for TPU multiplies two at half its speed
    gate_RF, up_RF = (linear(x_RD, w_FD).astype(jnp.float32) for w_FD in (gate_FD, up_FD))
    h_RF = jax.nn.silu(gate_RF) * up_RF
    if scale_x1 is not None:    # before the last product, whose result the backward pass then does not need
        h_RF = h_RF * scale_x1.reshape(-1, 1)
    return linear(h_RF.astype(x_xD.dtype), down_DF).reshape(x_xD.shape)


class Mlp(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x_BtD):
        D, F, init = self.cfg.d_model, self.cfg.d_ff, normal(self.cfg.init_std)
        split = Split.of(self.cfg, self.ax, "ffn")
        y_BTD = swiglu(split.enter(x_BtD),
                       matrix(self, "gate", (F, D), ("ffn", "embed"), init),
                       matrix(self, "up", (F, D), ("ffn", "embed"), init),
                       matrix(self, "down", (D, F), ("embed", "ffn"), init))
        return split.leave(y_BTD)
