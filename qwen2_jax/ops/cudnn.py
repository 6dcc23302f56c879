"""Attention over whole rows on NVIDIA GPUs: cuDNN's kernel, by way of `jax.nn.dot_product_attention`.

The kernel knows causality, and otherwise a mask that it reads from memory. So there are two ways: rows of one segment
in order, padded at their end or not at all, go through it whole, and it skips what causality hides; all else (packed
rows, windows, a piece of a row) goes some queries at a time with a mask, and what that hides is computed all the same.

Not run on a GPU yet; on CPU the same calls are tested with XLA's form of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qwen2_jax.ops.attention import attend
from qwen2_jax.sharding.axes import Axes

QUERY_CHUNK = 2048
"""Queries that share a mask: [B, 1, 2048, S] in bfloat16 is 128 MiB a row of 32,768 tokens."""
WIDEST = 128
"""Head width that the kernel takes before Hopper."""


def suits(ax: Axes, dtype, tokens: int, head_dim: int) -> bool:
    """Whether the kernel runs there, on rows of `tokens` tokens. It needs compute capability 8.0."""
    return (ax.chip.startswith("NVIDIA") and dtype == jnp.bfloat16 and tokens % 2 == 0
            and head_dim % 8 == 0 and head_dim <= WIDEST)


def cudnn_attend(q_BTNH, k_BSKH, v_BSKH, *, slots_BT=None, key_slots_BS=None, segments_BT=None,
                 key_segments_BS: Any = None, windowed=None, window: int = 0, chunk: int = QUERY_CHUNK,
                 implementation: Literal["cudnn", "xla"] = "cudnn"):
    """`ops.attention.attend`: the same arguments and result, but what padding at a row's end sees. Where queries are as
    many as keys, they are the row's tokens in order."""
    product = partial(jax.nn.dot_product_attention, implementation=implementation)
    T = q_BTNH.shape[1]

    def masked(q_BtNH, mask_BtS):
        return product(q_BtNH, k_BSKH, v_BSKH, mask=mask_BtS[:, None])

    def general():
        return attend(q_BTNH, k_BSKH, v_BSKH, slots_BT=slots_BT, key_slots_BS=key_slots_BS, segments_BT=segments_BT,
                      key_segments_BS=key_segments_BS, windowed=windowed, window=window, chunk=chunk, product=masked)

    def whole():
        return product(q_BTNH, k_BSKH, v_BSKH, is_causal=True)

    if T != k_BSKH.shape[1] or (window and windowed is not None):
        return general()
    if segments_BT is None:
        return whole()
    # The same segment as the token before, or padding: a later token is hidden by causality, whatever it is.
    plain = jnp.all((segments_BT[:, 1:] == segments_BT[:, :-1]) | (segments_BT[:, 1:] == 0))
    return jax.lax.cond(plain, whole, general)
