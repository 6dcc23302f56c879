"""Sparse block of Qwen2-57B-A14B: routed experts plus one shared expert behind a sigmoid gate."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.config import ModelConfig, MoeConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model.mlp import swiglu
from qwen2_jax.model.params import matrix, normal, weight
from qwen2_jax.ops.dot import matmul
from qwen2_jax.ops.exchange import ExpertExchange, exchanged
from qwen2_jax.ops.experts import (
    ExpertWeights,
    RouterStats,
    blocked_experts,
    grouped_experts,
    route,
    router_stats,
)
from qwen2_jax.sharding.axes import EXPERT, Axes
from qwen2_jax.sharding.rules import Rules
from qwen2_jax.sharding.split import Split


class Moe(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any
    train: bool
    exchange: ExpertExchange = "auto"

    @nn.compact
    def __call__(self, x_BtD, counts_Bt) -> tuple[jax.Array, RouterStats]:
        """→ ([B, t, D], router statistics over the tokens where `counts_Bt` holds).

        Experts stay, tokens travel: a device gets tokens of all that share its experts, computes what its own experts
        make of them, and the results are summed where the tokens came from. Nothing is dropped. Tokens are gathered by
        all, or each is sent to where it is wanted (`exchange`, see `ops/exchange.py`).
        """
        moe, init = self._moe, normal(self.cfg.init_std)
        D, E, F = self.cfg.d_model, moe.experts, moe.d_expert
        expert_axes = ("expert", "expert_ffn", "embed")
        w = ExpertWeights(weight(self, "gate", (E, F, D), expert_axes, init),
                          weight(self, "up", (E, F, D), expert_axes, init),
                          weight(self, "down", (E, D, F), ("expert", "embed", "expert_ffn"), init))
        x_RD = x_BtD.reshape(-1, D)
        router = weight(self, "router", (E, D), ("router", "embed"), init)
        weight_Rk, expert_Rk, probability_RE = route(x_RD, router, top_k=moe.top_k, normalise=moe.norm_topk_prob)
        stats = router_stats(expert_Rk, probability_RE, counts_Bt.reshape(-1))
        split, shared_split = (Split.of(self.cfg, self.ax, name) for name in ("expert_ffn", "shared_ffn"))
        x_BTD, weight_BTk, expert_BTk = (split.enter(a.reshape(*x_BtD.shape[:2], -1))
                                         for a in (x_BtD, weight_Rk, expert_Rk))
        y_BTD = self._routed(x_BTD, weight_BTk, expert_BTk, w)
        if shared_split == split:       # then they go in and out together
            return split.leave((y_BTD + self._shared(x_BTD, split)).astype(x_BtD.dtype)), stats
        shared_BTD = self._shared(shared_split.enter(x_BtD), shared_split)
        return split.leave(y_BTD.astype(x_BtD.dtype)) + shared_split.leave(shared_BTD.astype(x_BtD.dtype)), stats

    @property
    def _moe(self) -> MoeConfig:
        assert self.cfg.moe is not None     # the decoder makes this block for sparse layers only
        return self.cfg.moe

    def _shared(self, x_BTD, split: Split):
        """This device's part of what the shared expert makes of any tokens, float32."""
        D, S, init = self.cfg.d_model, self._moe.d_shared, normal(self.cfg.init_std)
        router = self.ax.vary(weight(self, "shared_router", (1, D), ("router", "embed"), init), split.over)
        y_BTD = swiglu(x_BTD, matrix(self, "shared_gate", (S, D), ("shared_ffn", "embed"), init),
                       matrix(self, "shared_up", (S, D), ("shared_ffn", "embed"), init),
                       matrix(self, "shared_down", (D, S), ("embed", "shared_ffn"), init),
                       jax.nn.sigmoid(matmul(x_BTD, router)))
        return y_BTD.astype(jnp.float32)

    def _routed(self, x_BTD, weight_BTk, expert_BTk, w: ExpertWeights):
        """This device's part of what the experts make of its tokens, float32; `w` are its experts."""
        ax, over = self.ax, Rules.of(self.cfg, self.ax).split_over("expert")
        experts = partial(self._experts, w=w, share=1 / ax.size(over))
        here = w.gate_EFD.shape[0]
        if over and self._exchanges(x_BTD.shape[1]):
            return exchanged(experts, here, _flat(x_BTD), _flat(weight_BTk), _flat(expert_BTk), ax).reshape(x_BTD.shape)
        x_bTD, weight_bTk, expert_bTk = (ax.gather(a, over, 0) for a in (x_BTD, weight_BTk, expert_BTk))
        # Another device's experts get the number behind the last of our own.
        expert_bTk = expert_bTk - ax.index(over) * here
        expert_bTk = jnp.where((expert_bTk >= 0) & (expert_bTk < here), expert_bTk, here) if over else expert_bTk
        y_bTD = experts(_flat(x_bTD), _flat(weight_bTk), _flat(expert_bTk)).reshape(x_bTD.shape)
        return ax.scatter(y_bTD.astype(x_BTD.dtype), over, 0).astype(jnp.float32) if over else y_bTD

    def _experts(self, x_RD, weight_Rk, expert_Rk, w: ExpertWeights, share: float) -> Any:
        grouped, args = partial(grouped_experts, ax=self.ax, share=share), (x_RD, weight_Rk, expert_Rk, w)
        return grouped(*args) if self.train else lax.platform_dependent(*args, cpu=blocked_experts, default=grouped)

    def _exchanges(self, tokens: int) -> bool:
        """Whether rows go to where they are wanted, or everywhere. By itself: where devices are more than choices, so
        that fewer travel, and can be sent ragged; not for a token at a time."""
        if self.exchange == "auto":
            return self.ax.size(EXPERT) > self._moe.top_k and self.ax.on_tpu and tokens > 1
        if self.exchange not in get_args(ExpertExchange):
            raise UserError(f"expert_exchange '{self.exchange}' is not supported: "
                            f"{', '.join(get_args(ExpertExchange))} are")
        return self.exchange == "all_to_all"


def _flat(a_BTx):
    return a_BTx.reshape(-1, a_BTx.shape[-1])
