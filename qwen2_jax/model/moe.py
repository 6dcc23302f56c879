"""Sparse block of Qwen2-57B-A14B: routed experts plus one shared expert behind a sigmoid gate."""

from __future__ import annotations

from functools import partial
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
from qwen2_jax.ops.exchange import ExpertExchange, exchanged
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.rules import Rules
from qwen2_jax.sharding.split import Split


class Moe(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any
    train: bool
    exchange: ExpertExchange = "gather"

    @nn.compact
    def __call__(self, x_BtD, counts_Bt) -> tuple[jax.Array, RouterStats]:
        """→ ([B, t, D], router statistics over the tokens where `counts_Bt` holds).

        Experts stay, tokens travel: a device gets the tokens of all that share its experts, computes what its own
        experts make of them, and the results are summed where the tokens came from. Nothing is dropped.
        """
        moe, init = self.cfg.moe, normal(self.cfg.init_std)
        assert moe is not None      # the decoder makes this block for sparse layers only
        D, E, F, S = self.cfg.d_model, moe.experts, moe.d_expert, moe.d_shared
        expert_axes = ("expert", "expert_ffn", "embed")
        w = ExpertWeights(weight(self, "gate", (E, F, D), expert_axes, init),
                          weight(self, "up", (E, F, D), expert_axes, init),
                          weight(self, "down", (E, D, F), ("expert", "embed", "expert_ffn"), init))
        x_RD = x_BtD.reshape(-1, D)
        router = weight(self, "router", (E, D), ("router", "embed"), init)
        weight_Rk, expert_Rk, probability_RE = route(x_RD, router, top_k=moe.top_k, normalise=moe.norm_topk_prob)
        by_token = (*x_BtD.shape[:2], moe.top_k)
        routed_BtD = self._routed(x_BtD, weight_Rk.reshape(by_token), expert_Rk.reshape(by_token), w)
        split = Split.of(self.cfg, self.ax, "shared_ffn")
        shared_BtD = split.leave(swiglu(split.enter(x_BtD),
                                        weight(self, "shared_gate", (S, D), ("shared_ffn", "embed"), init),
                                        weight(self, "shared_up", (S, D), ("shared_ffn", "embed"), init),
                                        weight(self, "shared_down", (D, S), ("embed", "shared_ffn"), init)))
        share_R1 = jax.nn.sigmoid(matmul(x_RD, weight(self, "shared_router", (1, D), ("router", "embed"), init)))
        shared_BtD = share_R1.reshape(*x_BtD.shape[:2], 1) * shared_BtD.astype(jnp.float32)
        y_BtD = (routed_BtD + shared_BtD).astype(x_BtD.dtype)
        return y_BtD, router_stats(expert_Rk, probability_RE, counts_Bt.reshape(-1))

    def _routed(self, x_BtD, weight_Btk, expert_Btk, w: ExpertWeights):
        """What the experts make of this device's tokens, float32 [B, t, D]; `w` are this device's experts."""
        ax, rules = self.ax, Rules.of(self.cfg, self.ax)
        split, over = Split.of(self.cfg, ax, "expert_ffn"), rules.split_over("expert")
        rows = tuple(split.enter(a) for a in (x_BtD, weight_Btk, expert_Btk))
        experts = partial(self._experts, w=w, share=1 / ax.size(over))
        here = w.gate_EFD.shape[0]
        if over and self._exchanges(rows[0].shape[1]):
            y_BTD = exchanged(experts, here, *map(_flat, rows), ax).reshape(rows[0].shape)
            return split.leave(y_BTD)
        x_bTD, weight_bTk, expert_bTk = (ax.gather(a, over, 0) for a in rows)
        # Another device's experts get the number behind the last of our own.
        expert_bTk = expert_bTk - ax.index(over) * here
        expert_bTk = jnp.where((expert_bTk >= 0) & (expert_bTk < here), expert_bTk, here) if over else expert_bTk
        y_bTD = experts(*map(_flat, (x_bTD, weight_bTk, expert_bTk))).reshape(x_bTD.shape)
        return split.leave(ax.scatter(y_bTD, over, 0))

    def _experts(self, *rows, w: ExpertWeights, share: float):
        grouped = partial(grouped_experts, ax=self.ax, share=share)
        if self.train:
            return grouped(*rows, w)
        return lax.platform_dependent(*rows, w, cpu=blocked_experts, default=grouped)

    def _exchanges(self, tokens: int) -> bool:
        return self.exchange == "all_to_all"


def _flat(a_BTx):
    return a_BTx.reshape(-1, a_BTx.shape[-1])
