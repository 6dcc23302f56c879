"""Grouped-query attention with biases on queries, keys and values, none on the output."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.cache import write
from qwen2_jax.model.params import normal, weight, zeros
from qwen2_jax.ops.attention import attend, attend_cache
from qwen2_jax.ops.dot import linear
from qwen2_jax.ops.rope import apply_rope
from qwen2_jax.sharding.axes import Axes


class Context(NamedTuple):
    """What all layers share: rotary tables, and either segments (whole rows) or slots (a cache)."""

    cos_BTh: jax.Array
    sin_BTh: jax.Array
    segments_BT: jax.Array | None = None
    start: jax.Array | None = None
    slots_BT: jax.Array | None = None


class Attention(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, context: Context, windowed, layer, cache):
        """→ ([B, T, D], cache). `cache` is this run's {"k", "v"} or None; `layer` indexes it."""
        cfg = self.cfg
        B, T, D = x_BTD.shape
        N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
        init = normal(cfg.init_std)

        def project(name: str, heads: int):
            axis = "heads" if name == "q" else "kv_heads"
            w = weight(self, name, (heads * H, D), (axis, "embed"), init)
            bias = weight(self, f"{name}_bias", (heads * H,), (axis,), zeros)
            return linear(x_BTD, w, bias).reshape(B, T, heads, H)

        q_BTNH, k_BTKH, v_BTKH = project("q", N), project("k", K), project("v", K)
        q_BTNH = apply_rope(q_BTNH, context.cos_BTh, context.sin_BTh)
        k_BTKH = apply_rope(k_BTKH, context.cos_BTh, context.sin_BTh)
        sliding = dict(windowed=windowed, window=cfg.window.size or 0)
        if cache is None:
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segments_BT=context.segments_BT, **sliding)
        else:
            cache = {"k": write(cache["k"], layer, k_BTKH, context.start),
                     "v": write(cache["v"], layer, v_BTKH, context.start)}
            k_BKSH, v_BKSH = (jax.lax.dynamic_index_in_dim(cache[n], layer, keepdims=False) for n in ("k", "v"))
            out_BTNH = attend_cache(q_BTNH, k_BKSH, v_BKSH, slots_BT=context.slots_BT, ax=self.ax, **sliding)
        w_o = weight(self, "o", (D, N * H), ("embed", "heads"), init)
        return linear(out_BTNH.reshape(B, T, N * H), w_o), cache
