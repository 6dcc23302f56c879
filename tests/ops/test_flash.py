"""The splash kernel, interpreted on CPU, against the reference: outputs and gradients, whole rows and their pieces."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen2_jax.ops import flash
from qwen2_jax.ops.attention import attend
from qwen2_jax.sharding.axes import BATCH, CONTEXT, ONE_DEVICE, TENSOR, Axes
from qwen2_jax.sharding.mesh import make_mesh, per_device
from qwen2_jax.sharding.order import RowOrder, balance

ONLINE_SOFTMAX = 3e-5
"""Float32: the same sums, taken block by block."""
B, T, N, K, H = 2, 512, 4, 2, 64


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ONLINE_SOFTMAX * float(jnp.abs(b).max()))


@functools.cache
def row():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K, N), strict=True))
    segments_BT = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (B, T)), axis=1), jnp.int32)
    return q, k, v, g, segments_BT


def value_and_gradients(fn, g):
    def scalar(q, k, v):
        out = fn(q, k, v)
        return jnp.sum(out * g), out
    def both(q, k, v):
        (_, out), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients
    return jax.jit(both)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("windowed", [None, False, True])
def test_whole_rows(packed, windowed):
    q, k, v, g, segments_BT = row()
    rest = dict(windowed=None if windowed is None else jnp.asarray(windowed), window=40)
    if packed:
        rest |= dict(segments_BT=segments_BT, key_segments_BS=segments_BT)
    whole = functools.partial(flash.flash_attend, order=RowOrder(1, 0, 0), ax=ONE_DEVICE, interpret=True, **rest)
    close(value_and_gradients(whole, g)(q, k, v), value_and_gradients(functools.partial(attend, **rest), g)(q, k, v))


@pytest.mark.parametrize("names, mesh", [(CONTEXT, "context=2"), (CONTEXT + TENSOR, "context=2,tensor=2"),
                                         (TENSOR, "data=2,tensor=2")])
@pytest.mark.parametrize("balanced", [False, True])
def test_pieces_of_rows(names, mesh, balanced):
    """Each device attends from its own tokens to all keys; gradients add up to those of one device."""
    q, k, v, g, segments_BT = row()
    mesh = make_mesh(mesh)
    halves = 2 * Axes.of(mesh).size(CONTEXT) if balanced and Axes.of(mesh).size(CONTEXT) > 1 else 0
    slots = RowOrder.slots_of(T, halves)

    def local(*row, ax: Axes):
        if balanced:
            ax, row = balance(ax, row)
        q, k, v, segments = (ax.piece(x, [name for name in names if name in TENSOR], 1) for x in row)
        return flash.flash_attend(q, ax.gather(k, names, 1), ax.gather(v, names, 1), order=RowOrder.of(ax, names),
                                  segments_BT=segments, key_segments_BS=ax.gather(segments, names, 1), ax=ax,
                                  interpret=True)

    mapped = per_device(local, mesh, P(BATCH, CONTEXT), P(BATCH, names))
    reference = functools.partial(attend, segments_BT=segments_BT, key_segments_BS=segments_BT)
    expected = value_and_gradients(lambda *qkv: reference(*qkv)[:, slots], g[:, slots])
    close(value_and_gradients(lambda *qkv: mapped(*qkv, segments_BT), g[:, slots])(q, k, v), expected(q, k, v))


@pytest.mark.parametrize("windowed", [None, False, True])
def test_chunks_of_a_prompt_over_a_cache(windowed):
    """A chunk anywhere in the row, against the reference; what lies behind it in the cache is not seen."""
    q, k, v, _, _ = row()
    rest = dict(windowed=None if windowed is None else jnp.asarray(windowed), window=40)
    expected = jax.jit(functools.partial(attend, **rest))(q, k, v)
    cache = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    chunk = jax.jit(functools.partial(flash.flash_attend_cache, ax=ONE_DEVICE, interpret=True, **rest))
    k_BKSH, v_BKSH = (jnp.pad(x, ((0, 0), (0, 0), (0, 128), (0, 0)), constant_values=50.0) for x in cache)
    for start in (0, 128, 384):
        close(chunk(q[:, start:start + 128], k_BKSH, v_BKSH, start=jnp.int32(start)), expected[:, start:start + 128])
    assert jnp.isnan(chunk(q[:, 64:192], k_BKSH, v_BKSH, start=jnp.int32(64))).all()


def test_where_the_kernel_runs_over_a_cache():
    tpu = Axes(chip="TPU v5 lite")
    assert flash.suits_cache(tpu, jnp.bfloat16, 512, 4096)
    for ax, dtype, tokens, slots in ((tpu, jnp.bfloat16, 1, 4096), (tpu, jnp.bfloat16, 512, 4224),
                                     (tpu, jnp.float32, 512, 4096), (tpu, jnp.bfloat16, 32, 4096),
                                     (Axes(chip="TPU v2"), jnp.bfloat16, 512, 4096),
                                     (ONE_DEVICE, jnp.bfloat16, 512, 4096)):
        assert not flash.suits_cache(ax, dtype, tokens, slots)
