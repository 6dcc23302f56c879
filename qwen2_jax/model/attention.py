"""Grouped-query attention with biases on queries, keys and values, none on the output."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.cache import write
from qwen2_jax.model.params import matrix, normal, weight, zeros
from qwen2_jax.ops import cudnn, flash
from qwen2_jax.ops.attention import attend, attend_cache
from qwen2_jax.ops.bits import from_bits
from qwen2_jax.ops.dot import linear
from qwen2_jax.ops.rope import apply_rope
from qwen2_jax.sharding.axes import TENSOR, Axes
from qwen2_jax.sharding.order import RowOrder
from qwen2_jax.sharding.rules import Rules
from qwen2_jax.sharding.split import Split


class Context(NamedTuple):
    """What all layers share of the tokens that attention sees on this device: rotary tables and slots; the segments of
    whole rows; where a cache is written."""

    cos_BTh: jax.Array
    sin_BTh: jax.Array
    slots_BT: jax.Array
    """A token's index in its row, int32."""
    key_slots_BS: jax.Array
    """Those of all the row's tokens, whose keys attention sees."""
    segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    start: jax.Array | None = None


class Attention(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x_BtD, context: Context, windowed, layer, cache):
        """→ ([B, t, D], cache). `cache` is this run's {"k", "v"} or None; `layer` indexes it.

        Where heads are not split over tensor, its devices share the row's tokens instead, as those along context do:
        each computes its own queries against the keys and values of all.
        """
        cfg, ax = self.cfg, self.ax
        split = Split.of(cfg, ax, "heads")
        x_BTD = split.enter(x_BtD)
        B, T, D = x_BTD.shape
        N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
        init = normal(cfg.init_std)

        def project(name: str, heads: int):
            axis = "heads" if name == "q" else "kv_heads"
            # One head's rows are cut out of the keys' and values' where there are fewer than devices.
            w = (matrix if name == "q" else weight)(self, name, (heads * H, D), (axis, "embed"), init)
            bias = weight(self, f"{name}_bias", (heads * H,), (axis,), zeros)
            if name != "q":
                w, bias = self._own_head(w), self._own_head(bias)
            return linear(x_BTD, w, bias).reshape(B, T, -1, H)

        q_BTNH, k_BTKH, v_BTKH = project("q", N), project("k", K), project("v", K)
        q_BTNH = apply_rope(q_BTNH, context.cos_BTh, context.sin_BTh)
        k_BTKH = apply_rope(k_BTKH, context.cos_BTh, context.sin_BTh)
        sliding: dict[str, Any] = dict(windowed=windowed, window=cfg.window.size or 0)
        if cache is None:
            segments: dict[str, Any] = dict(segments_BT=context.segments_BT, key_segments_BS=context.key_segments_BS)
            rows = (q_BTNH, split.of_row(k_BTKH), split.of_row(v_BTKH))
            if flash.suits(ax, q_BTNH.dtype, T):
                out_BTNH = flash.flash_attend(*rows, order=RowOrder.of(ax, split.tokens), ax=ax, **segments, **sliding)
            else:
                form = cudnn.cudnn_attend if cudnn.suits(ax, q_BTNH.dtype, T, H) else attend
                out_BTNH = form(*rows, slots_BT=context.slots_BT, key_slots_BS=context.key_slots_BS, **segments,
                                **sliding)
        else:
            cache = {"k": write(cache["k"], layer, k_BTKH, context.start),
                     "v": write(cache["v"], layer, v_BTKH, context.start)}
            if flash.suits_cache(ax, q_BTNH.dtype, T, cache["k"].shape[3]):
                held = (from_bits(jax.lax.dynamic_index_in_dim(cache[n], layer, keepdims=False), q_BTNH.dtype)
                        for n in ("k", "v"))
                out_BTNH = flash.flash_attend_cache(q_BTNH, *held, start=context.start, ax=ax, **sliding)
            else:
                out_BTNH = attend_cache(q_BTNH, cache["k"], cache["v"], layer, slots_BT=context.slots_BT, ax=ax,
                                        **sliding)
        w_o = matrix(self, "o", (D, N * H), ("embed", "heads"), init)
        return split.leave(linear(out_BTNH.reshape(B, T, -1), w_o)), cache

    def _own_head(self, w):
        """Weights of the key-value head that this device's queries look at, where there are fewer than devices."""
        copies = Rules.of(self.cfg, self.ax).kv_copies
        if copies == 1:
            return w
        H = self.cfg.head_dim
        start = self.ax.index(TENSOR) // copies * H
        return jax.tree.map(lambda piece: jax.lax.dynamic_slice_in_dim(piece, start, H), self.ax.vary(w, TENSOR))
