"""Products and the norm: against float64, and bit-equal whatever the number of rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen2_jax.ops.dot import Spread, for_product, linear, matmul
from qwen2_jax.ops.norm import rms_norm
from qwen2_jax.sharding.axes import BATCH, FSDP, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, make_mesh, per_device

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


def spread_gradients(spec: str, *, dtype=jnp.float32, kept=None, rows=8, D=64, O=32):
    """(product, gradient of x, of w; what they are in float64) of a `Spread` on a mesh of CPU devices."""
    mesh = make_mesh(spec)
    over = Axes.of(mesh).live(FSDP)
    rng = np.random.default_rng(0)
    x, g, w = (rng.normal(size=s).astype(np.float32) for s in ((rows * 8, D), (rows * 8, O), (O, D)))
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype).astype(kept or dtype)

    def local(x_RD, w_oD, g_RO, *, ax):
        y_RO = matmul(x_RD, Spread(ax.vary(w_oD, BATCH), ax, over))
        return y_RO, ax.psum((y_RO * g_RO).sum(), BATCH)

    mapped = per_device(local, mesh, (BATCH_SPEC, P(over), BATCH_SPEC), (BATCH_SPEC, REPLICATED))

    def loss(x, w):
        y, total = mapped(x, w, g)
        return total, y

    (dx, dw), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, jnp.asarray(g, dtype)))
    return (y, dx, dw), (x64 @ w64.T, g64 @ w64, g64.T @ x64)


@pytest.mark.parametrize("spec", ["fsdp=2", "fsdp=4", "fsdp=8", "fsdp=2x4", "fsdp=2x2x2", "data=2,fsdp=4"])
def test_gradients_that_leave_as_they_are_made(spec):
    """One way round, both ways (eight devices along one axis), one axis after the other."""
    ours, exact = spread_gradients(spec)
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) <= FLOAT32


def test_gradients_are_summed_in_the_dtype_of_the_piece():
    """Of bfloat16: rounded at every stop. Of float32, for a product in bfloat16: not at all."""
    (*_, rough), (*_, exact) = spread_gradients("fsdp=8", dtype=jnp.bfloat16)
    (*_, fine), _ = spread_gradients("fsdp=8", dtype=jnp.bfloat16, kept=jnp.float32)
    assert (rough.dtype, fine.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative(fine, exact) <= FLOAT32
    assert 100 * FLOAT32 < relative(rough.astype(jnp.float32), exact) <= 8 * 2.0**-9


def test_whether_a_matrix_stays_spread():
    on = Axes((("fsdp_x", 4),), chip="TPU v5 lite")
    large, small = (jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (32, 16))
    assert isinstance(for_product(large, on, ("fsdp_x",), jnp.float32), Spread)
    assert for_product(large, on, ("fsdp_x",), jnp.float32).shape == (128, 1024)
    for held, piece in ((on, small), (dataclasses.replace(on, chip="cpu"), large)):
        def gathered(w, *, ax, held=held):
            return for_product(w, held, ("fsdp_x",), jnp.bfloat16)

        rows = 4 * piece.shape[0]
        out = jax.eval_shape(per_device(gathered, make_mesh("fsdp=4"), P("fsdp_x"), P(None, "fsdp_x")),
                             jax.ShapeDtypeStruct((rows, 1024), jnp.float32))
        assert (out.shape, out.dtype) == ((rows, 4 * 1024), jnp.bfloat16)
