"""Sparse block of Qwen2-57B-A14B: routed experts plus one shared expert behind a sigmoid gate."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.mlp import swiglu
from qwen2_jax.model.params import normal, weight
from qwen2_jax.ops.dot import matmul
from qwen2_jax.ops.experts import (
    ExpertWeights,
    RouterStats,
    blocked_experts,
    grouped_experts,
    route,
    router_stats,
)
from qwen2_jax.sharding.axes import Axes


class Moe(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x_BTD, counts_BT) -> tuple[jax.Array, RouterStats]:
        """→ ([B, T, D], router statistics over the tokens where `counts_BT` holds)."""
        moe, init = self.cfg.moe, normal(self.cfg.init_std)
        assert moe is not None      # the decoder makes this block for sparse layers only
        D, E, F, S = self.cfg.d_model, moe.experts, moe.d_expert, moe.d_shared
        expert_axes = ("expert", "expert_ffn", "embed")
        w = ExpertWeights(weight(self, "gate", (E, F, D), expert_axes, init),
                          weight(self, "up", (E, F, D), expert_axes, init),
                          weight(self, "down", (E, D, F), ("expert", "embed", "expert_ffn"), init))
        x_RD = x_BTD.reshape(-1, D)
        router = weight(self, "router", (E, D), ("router", "embed"), init)
        weight_Rk, expert_Rk, probability_RE = route(x_RD, router, top_k=moe.top_k, normalise=moe.norm_topk_prob)
        if self.train:
            routed_RD = grouped_experts(x_RD, weight_Rk, expert_Rk, w)
        else:
            routed_RD = lax.platform_dependent(x_RD, weight_Rk, expert_Rk, w,
                                               cpu=blocked_experts, default=grouped_experts)
        shared_RD = swiglu(x_RD,
                           weight(self, "shared_gate", (S, D), ("ffn", "embed"), init),
                           weight(self, "shared_up", (S, D), ("ffn", "embed"), init),
                           weight(self, "shared_down", (D, S), ("embed", "ffn"), init))
        share_R1 = jax.nn.sigmoid(matmul(x_RD, weight(self, "shared_router", (1, D), ("router", "embed"), init)))
        y_RD = (routed_RD + share_R1 * shared_RD.astype(jnp.float32)).astype(x_BTD.dtype)
        return y_RD.reshape(x_BTD.shape), router_stats(expert_Rk, probability_RE, counts_BT.reshape(-1))
