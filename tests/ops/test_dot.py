"""Products and the norm: against float64, and bit-equal whatever the number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.ops.dot import linear, matmul
from qwen2_jax.ops.norm import rms_norm

FLOAT32 = 3e-6
"""Relative to the norm: sums of at most 64 terms."""


def drawn(dtype, R=10, D=64, O=24):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((R, D), (O, D), (O,)))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_accumulate_in_float32(dtype):
    x, w, bias = drawn(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    y = matmul(x, w)
    assert y.dtype == jnp.float32 and relative(y, exact) <= FLOAT32
    assert linear(x, w, bias).dtype == dtype
    rounded_once = jnp.asarray(exact + np.asarray(bias, np.float64), dtype)
    # One rounding: at most a few numbers that lie on the border between two neighbours may differ.
    assert np.mean(np.asarray(linear(x, w, bias) == rounded_once)) > (0.99 if dtype == jnp.bfloat16 else 0)
    assert relative(linear(x, w, bias).astype(jnp.float32), exact + np.asarray(bias, np.float64)) <= (
        2.0**-8 if dtype == jnp.bfloat16 else FLOAT32)


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(dtype, rows):
    x, w, bias = drawn(dtype, R=rows)
    g = np.random.default_rng(1).normal(size=(rows, 24)).astype(np.float32)
    grads = jax.grad(lambda *a: (linear(*a).astype(jnp.float32) * g).sum(), (0, 1, 2))(x, w, bias)
    g64, x64, w64 = (np.asarray(a, np.float64) for a in (jnp.asarray(g, dtype), x, w))
    tolerance = FLOAT32 if dtype == jnp.float32 else 2.0**-8
    for ours, exact in zip(grads, (g64 @ w64, g64.T @ x64, g64.sum(0)), strict=True):
        assert ours.dtype == dtype and relative(ours.astype(jnp.float32), exact) <= tolerance


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_has_the_bits_of_two(dtype):
    x, w, _ = drawn(dtype)
    np.testing.assert_array_equal(jax.jit(matmul)(x[:1], w), jax.jit(matmul)(x[:2], w)[:1])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_equals_transformers(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(5, 64)).astype(np.float32) * 1e-3, rng.normal(size=64).astype(np.float32)
    theirs = Qwen2RMSNorm(64, eps=1e-6).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        expected = theirs(torch.tensor(x).to(getattr(torch, dtype))).float().numpy()
    ours = rms_norm(jnp.asarray(x, dtype), jnp.asarray(scale, dtype), 1e-6)
    assert ours.dtype == jnp.dtype(dtype)
    if dtype == "bfloat16":     # a border case may fall to the other neighbour
        assert np.mean(np.asarray(ours.astype(jnp.float32)) == expected) > 0.99
    assert relative(ours.astype(jnp.float32), expected) <= (2.0**-9 if dtype == "bfloat16" else 1e-6)
