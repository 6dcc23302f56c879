"""Attention against a loop that follows the definition, and its two forms against each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.ops import attention
from qwen2_jax.ops.attention import KEY_BLOCK, attend, attend_cache, key_block
from qwen2_jax.sharding.axes import ONE_DEVICE, Axes

SUM_ORDER = 3e-6
"""Absolute, for outputs of size 1 in float32: sums of some hundred terms in another order."""
BFLOAT16 = 2.0**-7
"""Relative to the largest output: probabilities and the output are each rounded once, by 2^-9 at most."""


def draw(B, T, N, K, H, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    return jnp.asarray(3 * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def by_definition(q, k, v, segments=None, window=None):
    """Token by token, head by head, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1)
                if (window is None or t - s < window) and (segments is None or segments[b, s] == segments[b, t])]
        keys, values = k[b, seen, n // (N // k.shape[2])], v[b, seen, n // (N // k.shape[2])]
        p = np.exp(keys @ q[b, t, n] / np.sqrt(H))
        out[b, t, n] = p / p.sum() @ values
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
def test_equals_the_definition(heads, kv_heads):
    q, k, v = draw(2, 11, heads, kv_heads, 6)
    segments = np.array([[1] * 11, [0] * 2 + [1] * 4 + [2] * 5], np.int32)
    np.testing.assert_allclose(attend(q, k, v), by_definition(q, k, v), atol=SUM_ORDER)
    np.testing.assert_allclose(attend(q, k, v, segments_BT=segments), by_definition(q, k, v, segments), atol=SUM_ORDER)
    windowed = attend(q, k, v, segments_BT=segments, windowed=jnp.array(True), window=3)
    np.testing.assert_allclose(windowed, by_definition(q, k, v, segments, 3), atol=SUM_ORDER)
    np.testing.assert_array_equal(attend(q, k, v, windowed=jnp.array(False), window=3), attend(q, k, v))


@functools.partial(jax.jit, static_argnames="chunk")
def attended(q, k, v, segments, chunk):
    def total(q, k, v):
        out = attend(q, k, v, segments_BT=segments, windowed=jnp.array(True), window=7, chunk=chunk)
        return jnp.sum(jnp.sin(out)), out
    return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("chunk", [4, 5, 8])
def test_chunks_of_queries_change_nothing(chunk):
    """Also when the last chunk is padded, and for gradients, which recompute each chunk."""
    q, k, v = draw(2, 19, 4, 2, 8)
    segments = np.array([[1] * 9 + [2] * 10, [0] * 3 + [1] * 16], np.int32)
    grads, out = attended(q, k, v, segments, chunk)
    whole_grads, whole = attended(q, k, v, segments, 64)
    np.testing.assert_allclose(out, whole, atol=SUM_ORDER)
    for a, b in zip(grads, whole_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * SUM_ORDER)


def as_cache(x_BTKH, slots: int, fill=0.0):
    """Of one layer: rows at the cache's first slots, `fill` behind them."""
    x = jnp.swapaxes(x_BTKH, 1, 2)[None]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, slots - x.shape[3]), (0, 0)), constant_values=fill)


cached = jax.jit(functools.partial(attend_cache, layer=jnp.int32(0)), static_argnames="window")


@pytest.mark.parametrize("window", [None, 40, KEY_BLOCK + 44])
def test_cache_equals_whole_rows(window):
    """Over several key blocks, and with a window that spans one border or more than a block."""
    T = 2 * KEY_BLOCK + 70
    q, k, v = draw(1, T, 2, 1, 8)
    sliding = dict(windowed=jnp.array(True), window=window) if window else {}
    whole = attend(q, k, v, **sliding)
    at = np.array([0, 39, KEY_BLOCK - 1, KEY_BLOCK, 2 * KEY_BLOCK + 43, T - 1])
    out = cached(q[:, at], as_cache(k, 3 * KEY_BLOCK), as_cache(v, 3 * KEY_BLOCK), slots_BT=jnp.asarray(at)[None],
                 **sliding)
    np.testing.assert_allclose(out, whole[:, at], atol=SUM_ORDER)


def test_larger_blocks_on_tpu_change_nothing_but_bits(monkeypatch):
    monkeypatch.setattr(attention, "KEY_BLOCKS_TPU", (4 * KEY_BLOCK, 2 * KEY_BLOCK))
    tpu = Axes(chip="TPU v5 lite")
    assert [key_block(4 * KEY_BLOCK, tokens, tpu) // KEY_BLOCK for tokens in (1, 5)] == [4, 2]
    assert key_block(3 * KEY_BLOCK, 1, tpu) == key_block(4 * KEY_BLOCK, 1, ONE_DEVICE) == KEY_BLOCK
    q, k, v = draw(2, 400, 4, 2, 8)
    at = np.array([[3, 200, 380], [0, 1, 399]], np.int32)
    query, cache = q[np.arange(2)[:, None], at], [as_cache(x, 4 * KEY_BLOCK, 1e4) for x in (k, v)]
    for part in (slice(0, 1), slice(0, 3)):
        few, many = (attend_cache(query[:, part], *cache, 0, slots_BT=jnp.asarray(at[:, part]), ax=ax)
                     for ax in (tpu, ONE_DEVICE))
        np.testing.assert_allclose(few, many, atol=SUM_ORDER)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_lies_behind_a_query_and_who_sits_beside_it_change_no_bit(dtype):
    """Longer caches, garbage in unused slots, a neighbour with more blocks in use: equal to the last bit."""
    T = KEY_BLOCK + 30
    q, k, v = draw(2, T, 4, 2, 8, dtype=dtype)
    short_slots = jnp.array([[17], [100]], jnp.int32)
    query = q[jnp.arange(2)[:, None], short_slots]
    alone = cached(query, as_cache(k, 2 * KEY_BLOCK), as_cache(v, 2 * KEY_BLOCK), slots_BT=short_slots)
    longer = cached(query, as_cache(k, 4 * KEY_BLOCK, 1e4), as_cache(v, 4 * KEY_BLOCK, -1e4), slots_BT=short_slots)
    beside = cached(query, as_cache(k, 2 * KEY_BLOCK), as_cache(v, 2 * KEY_BLOCK),
                    slots_BT=short_slots.at[1, 0].set(T - 1))
    np.testing.assert_array_equal(alone, longer)
    np.testing.assert_array_equal(alone[0], beside[0])
    assert not np.array_equal(alone[1], beside[1])


@settings(max_examples=20, deadline=None)
@given(at=st.integers(0, 14), seed=st.integers(0, 99))
def test_no_token_sees_a_later_one(at, seed):
    q, k, v = draw(1, 16, 2, 1, 4)
    rng = np.random.default_rng(seed)
    later_k, later_v = (x.at[:, at + 1:].set(rng.normal(size=x[:, at + 1:].shape).astype(np.float32)) for x in (k, v))
    out, changed = attend(q, k, v), attend(q, later_k, later_v)
    np.testing.assert_array_equal(out[:, :at + 1], changed[:, :at + 1])
    assert np.abs(out - changed)[:, at + 1:].max() > 1e-3


def test_bfloat16_is_close_to_float32():
    q, k, v = draw(2, 33, 4, 2, 16, dtype=jnp.bfloat16)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert jnp.abs(out.astype(jnp.float32) - exact).max() <= BFLOAT16 * jnp.abs(exact).max()
