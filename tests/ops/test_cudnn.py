"""The two ways through cuDNN's attention, taken on CPU with XLA's form of the same calls: equal to the reference."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.model.decoder import Decoder, init_params
from qwen2_jax.ops import cudnn
from qwen2_jax.ops.attention import attend
from qwen2_jax.ops.cudnn import cudnn_attend, suits
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.axes import Axes

SUM_ORDER = 3e-6
"""Absolute, for outputs of size 1 in float32: sums of some tens of terms in another order."""
BFLOAT16 = 2.0**-6
"""Relative to the largest: probabilities, outputs and what follows are rounded at other places."""
B, T = 2, 24
SEGMENTS = {
    "one a row": [[1] * T] * 2,
    "padded behind": [[1] * T, [3] * 9 + [0] * 15],
    "padded in front": [[0] * 4 + [1] * 20, [1] * T],
    "packed": [[1] * 10 + [2] * 14, [1] * 5 + [2] * 5 + [3] * 9 + [0] * 5],
    "none": None,
}
on_cpu = partial(cudnn_attend, implementation="xla")


def draw():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, 8)), jnp.float32) for heads in (4, 2, 2))


@pytest.mark.parametrize("kind, window", [*((kind, 0) for kind in SEGMENTS), ("packed", 7), ("none", 7)])
def test_equals_the_reference(kind, window):
    """Outputs and gradients of tokens that are no padding, with queries a chunk at a time (24 = 3 x 9 less 3)."""
    q, k, v = draw()
    segments = SEGMENTS[kind] and jnp.asarray(SEGMENTS[kind], jnp.int32)
    real = jnp.ones((B, T), bool) if segments is None else segments > 0
    sliding = dict(windowed=jnp.array(True), window=window) if window else {}

    def total(form, q, k, v):
        out = form(q, k, v, segments_BT=segments, **sliding)
        return jnp.sum(jnp.where(real[..., None, None], jnp.sin(out), 0)), out

    (expected, exact), (found, out) = (jax.jit(jax.grad(partial(total, form), (0, 1, 2), has_aux=True))(q, k, v)
                                       for form in (attend, partial(on_cpu, chunk=9)))
    np.testing.assert_allclose(out[real], exact[real], atol=SUM_ORDER)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * SUM_ORDER)


@pytest.mark.parametrize("kind, causal", [("one a row", True), ("padded behind", True), ("packed", False),
                                          ("padded in front", False)])
def test_only_plain_rows_go_through_whole(kind, causal, monkeypatch):
    """Chosen as the program runs: the other way gives NaN here."""
    q, k, v = draw()
    real = jax.nn.dot_product_attention

    def product(q, k, v, *, is_causal=False, **options):
        return jnp.full_like(q, jnp.nan) if is_causal != causal else real(q, k, v, is_causal=is_causal, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", product)
    segments = jnp.asarray(SEGMENTS[kind], jnp.int32)
    assert jnp.isfinite(jax.jit(lambda *a: on_cpu(*a, segments_BT=segments))(q, k, v)).all()


def test_a_piece_of_a_row():
    """Queries at any slots of their row, keys in any order."""
    q, k, v = draw()
    slots = jnp.asarray([[3, 4, 5, 20], [0, 1, 22, 23]], jnp.int32)
    order = jnp.asarray(np.random.default_rng(1).permutation(T), jnp.int32)
    segments = jnp.asarray(SEGMENTS["packed"], jnp.int32)
    rows = jnp.arange(B)[:, None]
    where = dict(slots_BT=slots, key_slots_BS=jnp.broadcast_to(order, (B, T)), segments_BT=segments[rows, slots],
                 key_segments_BS=segments[:, order])
    args = q[rows, slots], k[:, order], v[:, order]
    found, expected = (jax.jit(form)(*args, **where) for form in (on_cpu, attend))
    np.testing.assert_allclose(found, expected, atol=SUM_ORDER)


def test_suits():
    h200 = Axes(chip="NVIDIA H200")
    assert suits(h200, jnp.bfloat16, 4096, 128) and suits(h200, jnp.bfloat16, 4096, 64)
    assert not suits(h200, jnp.float32, 4096, 128) and not suits(h200, jnp.bfloat16, 4095, 128)
    assert not suits(Axes(chip="TPU v5 lite"), jnp.bfloat16, 4096, 128) and not suits(Axes(), jnp.bfloat16, 4096, 128)


def test_the_model_takes_it_on_a_gpu_in_bfloat16(monkeypatch):
    cfg = dataclasses.replace(PRESETS["Qwen2-0.5B"], vocab=64, layers=1, d_model=32, d_ff=48, heads=4, kv_heads=2,
                              head_dim=8)
    params, ids = init_params(cfg, jax.random.key(0)), jnp.arange(2 * T, dtype=jnp.int32).reshape(2, T)
    taken = []

    def instead(*args, **options):
        taken.append(args[0].dtype)
        with jax.numpy_dtype_promotion("standard"):     # within JAX's own function
            return on_cpu(*args, **options)

    monkeypatch.setattr(cudnn, "cudnn_attend", instead)
    gpu, cpu = Axes(chip="NVIDIA H200"), Axes()
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, reference = (jax.jit(Decoder(cfg, ax, dtype).apply)({"params": params}, ids).x_BTD for ax in (gpu, cpu))
        assert jnp.abs(ours - reference).max() <= BFLOAT16 * jnp.abs(reference).max()
    assert set(taken) == {jnp.dtype(jnp.bfloat16)}
