"""Grouped products, in each of the ways that platforms take: against a loop over groups, with their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.ops import grouped_matmul as module
from qwen2_jax.ops.grouped_matmul import How, grouped_matmul
from qwen2_jax.ops.quant import meaning, quantize_rows
from qwen2_jax.sharding.axes import Axes

E, D, O = 5, 128, 256
SUM_ORDER = 2e-5
"""Absolute, for sums of a hundred products of size 1/10, in float32 and in another order."""
ROUNDING = 2**-8
"""One step of bfloat16, of a number up to 1."""
WAYS = {"ragged": How("ragged"), "tiles": How("tiles"), "kernel": How("kernel", interpret=True)}
SIZES = ((40, 0, 129, 1, 30), (0, 0, 0, 0, 0), (0, 200, 0, 0, 0), (50, 50, 50, 50, 0))


def arrays(dtype):
    draw = np.random.default_rng(0)
    shapes = (200, D), (E, O, D), (200, O)
    return tuple(jnp.asarray(draw.normal(size=s) / np.sqrt(s[-1]), dtype) for s in shapes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradients(way, dtype):
    x, w, g = arrays(dtype)
    given = [np.asarray(a, np.float32) for a in (x, w, g)]

    @jax.jit
    def found(sizes_E):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, WAYS[way]), x, w)
        return y, *back(g)

    for sizes in SIZES:
        y, x_slope, w_slope = (np.asarray(a, np.float32) for a in found(np.array(sizes, np.int32)))
        start, atol = 0, SUM_ORDER if dtype == jnp.float32 else ROUNDING
        for e, size in enumerate(sizes):
            own = slice(start, start := start + size)
            xs, ws, gs = given[0][own], given[1][e], given[2][own]
            np.testing.assert_allclose(y[own], xs @ ws.T, atol=atol)
            np.testing.assert_allclose(x_slope[own], gs @ ws, atol=atol)
            np.testing.assert_allclose(w_slope[e], gs.T @ xs, atol=atol)


@pytest.mark.parametrize("way", WAYS)
def test_int8_weights(way):
    x, w, _ = arrays(jnp.float32)
    w_int8, sizes = quantize_rows(w), (40, 0, 129, 1, 30)
    y = np.asarray(jax.jit(lambda: grouped_matmul(x, w_int8, jnp.array(sizes, jnp.int32), WAYS[way]))())
    start, w = 0, np.asarray(meaning(w_int8))
    for e, size in enumerate(sizes):
        own = slice(start, start := start + size)
        np.testing.assert_allclose(y[own], np.asarray(x)[own] @ w[e].T, atol=SUM_ORDER)


def test_the_way_for_a_device():
    def way(chip, dtype=jnp.bfloat16):
        return How.of(Axes(chip=chip), dtype).way

    assert [way(c) for c in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v6 lite", "cpu", "")] == [
        "tiles", "tiles", "kernel", "kernel", "kernel", "ragged", "ragged"]
    assert way("TPU v5", jnp.float32) == "tiles"


def test_tiles_of_the_kernel_divide_the_published_widths():
    assert [module._columns(n) for n in (3584, 2560, 18944, 1280, 256)] == [896, 640, 512, 640, 256]
