"""Grouped-query attention, the reference forms: over whole rows (training, scoring) and over a cache (generation).

Shape letters: B rows on this device, T query tokens, S key slots, N query heads, K key-value heads, G = N/K,
H head width.

Scores, softmax and sums are float32. A *slot* is a token's index in its row or in its row's cache; causality and the
sliding window compare slots, which inside one segment differ exactly as positions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.bits import from_bits
from qwen2_jax.sharding.axes import ONE_DEVICE, Axes

MASKED = -1e30
QUERY_CHUNK = 512
KEY_BLOCK = 128
"""Cache slots that decoding reads at a time on CPU. Cache lengths are multiples of it, so that a row's sums are taken
over the same blocks in the same order however long its neighbours' caches are: equal tokens to the last bit."""
KEY_BLOCKS_TPU = 2048, 512
"""At most as many on TPU, for one token a row and for several: each turn of the loop costs microseconds, and no bits
are promised there (docs/tpu_performance.md, 21)."""

_BATCHED_QK = (((3,), (3,)), ((0, 1), (0, 1)))
_BATCHED_PV = (((3,), (2,)), ((0, 1), (0, 1)))


def attend(q_BTNH, k_BSKH, v_BSKH, *, slots_BT=None, key_slots_BS=None, segments_BT=None, key_segments_BS: Any = None,
           windowed=None, window: int = 0, chunk: int = QUERY_CHUNK, product: Callable | None = None):
    """Causal attention over whole rows → [B, T, N, H] in q's dtype.

    Queries may be some of a row's tokens and keys all of them: `slots_BT` and `key_slots_BS` int32 (default: the tokens
    of a row in order) say which is where. `segments_BT`, `key_segments_BS` int: tokens see their own segment only.
    `windowed` bool scalar (may be traced): when true, a token sees the last `window` tokens, itself included. Queries
    are taken `chunk` at a time and recomputed in the backward pass, so memory grows with T, not with T squared.
    `product(some queries [B, t, N, H], bool [B, t, S])` may put a kernel in the place of scores, softmax and sum.
    """
    B, T, N, H = q_BTNH.shape
    if product is None:
        product = partial(_product, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    slots_BT = jnp.arange(T, dtype=jnp.int32)[None] if slots_BT is None else slots_BT
    key_slots_BS = slots_BT if key_slots_BS is None else key_slots_BS
    key_segments_BS = segments_BT if key_segments_BS is None else key_segments_BS

    def piece(q_BtNH, slot_Bt, segment_Bt):
        mask_BtS = _visible(slot_Bt, key_slots_BS, windowed, window)
        if segments_BT is not None:
            mask_BtS = mask_BtS & (segment_Bt[:, :, None] == key_segments_BS[:, None, :])
        return product(q_BtNH, mask_BtS)

    segments = segments_BT if segments_BT is not None else slots_BT
    if T <= chunk:
        return piece(q_BTNH, slots_BT, segments)
    pieces = -(-T // chunk)
    pad = pieces * chunk - T
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, pieces, chunk, N, H).swapaxes(0, 1)
    slots, segments = (jnp.pad(x, ((0, 0), (0, pad))).reshape(-1, pieces, chunk).swapaxes(0, 1)
                       for x in (slots_BT, segments))
    out = lax.map(lambda x: jax.checkpoint(piece)(*x), (q, slots, segments))
    return out.swapaxes(0, 1).reshape(B, pieces * chunk, N, H)[:, :T]


def _product(k_BKSH, v_BKSH, q_BtNH, mask_BtS):
    B, t, N, _ = q_BtNH.shape
    K, S = k_BKSH.shape[1:3]
    mask_BKRS = jnp.broadcast_to(mask_BtS[:, None, None], (B, K, N // K, t, S)).reshape(B, K, -1, S)
    p = jax.nn.softmax(_scores(q_BtNH, k_BKSH, mask_BKRS), axis=-1)
    return _merge_heads(_batched_dot(p, v_BKSH, _BATCHED_PV), N).astype(q_BtNH.dtype)


def key_block(slots: int, tokens: int, ax: Axes) -> int:
    """Slots of a cache of `slots` that attention of `tokens` tokens a row reads at a time."""
    return math.gcd(slots, KEY_BLOCKS_TPU[tokens > 1]) if ax.on_tpu else KEY_BLOCK


def attend_cache(q_BTNH, k_RBKSH, v_RBKSH, layer, *, slots_BT, windowed=None, window: int = 0, ax: Axes = ONE_DEVICE):
    """Attention of queries at `slots_BT` over the cache of R layers, of which this `layer` already holds their own keys
    → [B, T, N, H] in q's dtype.

    Reads key blocks up to the furthest slot in use, merging them with an online softmax. A block in which a row sees
    nothing leaves that row's sums untouched, to the last bit. S must be a multiple of KEY_BLOCK. Keys and values are of
    q's dtype, or hold its bits (ops/bits.py).
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_RBKSH.shape[2:4]
    size = key_block(S, T, ax)

    def block(i, carry):
        top, total, out = carry
        start = i * size
        # Out of all layers at once: the compiler would copy a layer's slots before it reads a block of them.
        k, v = (from_bits(lax.dynamic_slice(x_RBKSH, (layer, 0, 0, start, 0), (1, B, K, size, H))[0], q_BTNH.dtype)
                for x_RBKSH in (k_RBKSH, v_RBKSH))
        seen_BRS = _visible(slots_BR, (start + jnp.arange(size, dtype=jnp.int32))[None], windowed, window)
        scores = _scores(q_BTNH, k, seen_BRS[:, None])
        new_top = jnp.maximum(top, scores.max(-1))
        p = jnp.where(scores > MASKED / 2, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        out = out * keep[..., None] + _batched_dot(p, v, _BATCHED_PV)
        return new_top, total * keep + p.sum(-1), out

    rows = (B, K, T * (N // K))
    # Repeated for the heads that share keys here, and not as a mask, which XLA for TPU would write out.
    slots_BR = jnp.tile(slots_BT, (1, N // K))
    start = (jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, H), jnp.float32))
    blocks = slots_BT.max() // size + 1
    _, total, out = lax.fori_loop(0, blocks, block, ax.vary_like(start, q_BTNH))
    return _merge_heads(out / total[..., None], N).astype(q_BTNH.dtype)


def _visible(query_slots_BT, key_slots_BS, windowed, window: int):
    """Bool [B, T, S]: the key is not after the query and, where `windowed`, fewer than `window` slots before it."""
    distance = query_slots_BT[:, :, None] - key_slots_BS[:, None, :]
    mask = distance >= 0
    if window and windowed is not None:
        mask = mask & (~jnp.asarray(windowed) | (distance < window))
    return mask


def _scores(q_BTNH, k_BKSH, mask_BKRS):
    """Scaled, masked logits float32 [B, K, R, S]; the R = G T rows of one key-value head are its G query heads' tokens,
    head after head."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = _batched_dot(q_BKRH, k_BKSH, _BATCHED_QK) * jnp.float32(H**-0.5)
    return jnp.where(mask_BKRS, scores, jnp.float32(MASKED))


def _merge_heads(out_BKRH, heads: int):
    """[B, K, G*T, H] → [B, T, N, H]."""
    B, K, R, H = out_BKRH.shape
    G = heads // K
    return out_BKRH.reshape(B, K, G, R // G, H).transpose(0, 3, 1, 2, 4).reshape(B, R // G, heads, H)


def _batched_dot(a, b, dimensions):
    """A batched product in float32, of a rounded to b's dtype. XLA for CPU has no bfloat16 form of it, so there both
    sides are widened instead, and a is not rounded."""
    if b.dtype == jnp.float32:
        return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def widened(a, b):
        return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions,
                               preferred_element_type=jnp.float32)

    def direct(a, b):
        return lax.dot_general(a.astype(b.dtype), b, dimensions, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=widened, default=direct)

