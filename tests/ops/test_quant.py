"""Int8 matrices: how far from the weights, bit-equal on host and device, and products that mean what they mean."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwen2_jax.checkpoint.tree import flat
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import abstract_params, init_params, param_specs
from qwen2_jax.ops.dot import linear, matmul
from qwen2_jax.ops.experts import ExpertWeights, blocked_experts, grouped_experts
from qwen2_jax.ops.quant import (
    LEAST_SCALE,
    Int8,
    check_quant,
    dequantize,
    meaning,
    quant_of,
    quantize,
    quantize_rows,
    refuse_quantized,
)
from qwen2_jax.ops.vocab import embed
from qwen2_jax.sharding.mesh import make_mesh
from tests.serve.models import CONFIGS

SUM_ORDER = 5e-6
"""Relative to the norm: sums of at most 64 products in float32 in another order, and a scale outside of the sum."""
BFLOAT16 = 2.0**-8
"""Relative to the norm: one rounding to bfloat16."""

quantized = jax.jit(quantize_rows)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers in rows of unlike size, one of them zero."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2, (*shape[:-1], 1))
    w[..., 1, :] = 0
    return w.astype(np.float32)


MATRICES = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=3, max_side=6),
                         elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=60)
@given(MATRICES)
def test_each_number_is_half_a_step_away_at_most(w):
    """Of any finite size: rows of zeros and rows too small for a scale become zeros."""
    q = quantize_rows(w, np)
    assert q.values.dtype == np.int8 and q.scale.dtype == np.float32 and q.shape == w.shape
    assert np.abs(q.values.astype(int)).max() <= 127
    step = q.scale.astype(np.float64)[..., None]
    away = np.abs(q.values * step - w)
    assert (away <= np.maximum(step * (0.5 + 1e-4), 127 * LEAST_SCALE)).all()
    full = np.abs(q.values.astype(int)).max(-1) == 127
    assert (full == (q.scale > 0)).all(), "the largest of each row is 127 steps"


@pytest.mark.parametrize("seed", range(5))
def test_host_and_device_agree(seed):
    """To the last bit, but for a number in the middle between two."""
    w = drawn(512, 96, seed=seed)
    host, device = quantize_rows(w, np), jax.tree.map(np.asarray, quantized(w))
    assert (host.scale == device.scale).all() and host.scale.dtype == device.scale.dtype
    other = host.values != device.values
    steps = (w.astype(np.float64) / np.where(host.scale > 0, host.scale, 1)[:, None])[other]
    assert host.values.dtype == device.values.dtype and other.mean() < 1e-3
    assert np.allclose(np.abs(steps - np.trunc(steps)), 0.5, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_holds_no_number_is_not_hidden(bad):
    w = drawn(4, 160, 96)
    w[2, 3, 50] = bad
    for q in (quantize_rows(w, np), quantized(w)):
        assert np.argwhere(np.isnan(np.asarray(q.scale))).tolist() == [[2, 3]]


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("outputs", [3, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_their_gradients(dtype, outputs, rows):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rows, 64)), dtype)
    bias, g = rng.normal(size=outputs).astype(np.float32), rng.normal(size=(rows, outputs)).astype(np.float32)
    w = quantized(drawn(outputs, 64))
    w64 = np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)[:, None]
    exact = np.asarray(x, np.float64) @ w64.T
    assert matmul(x, w).dtype == jnp.float32 and relative(matmul(x, w), exact) <= SUM_ORDER
    y, grad = jax.value_and_grad(lambda x: (linear(x, w, bias).astype(jnp.float32) * g).sum())(x)
    near = SUM_ORDER if dtype == jnp.float32 else BFLOAT16
    rounded_g = np.asarray(jnp.asarray(g, dtype), np.float64)
    assert grad.dtype == dtype and relative(grad.astype(jnp.float32), rounded_g @ w64) <= near
    assert np.isfinite(float(y)) and linear(x, w, bias).dtype == dtype
    assert relative(linear(x, w, bias).astype(jnp.float32), exact + bias) <= near


def test_an_int8_matrix_has_no_gradient():
    w = quantized(drawn(6, 8))
    grad = jax.grad(lambda w: matmul(jnp.ones((2, 8)), w).sum(), allow_int=True)(w)
    assert grad.values.dtype == jax.dtypes.float0 and (grad.scale == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("experts", [grouped_experts, blocked_experts])
def test_experts(experts, dtype):
    """As what the matrices mean; a choice numbered E, of an expert elsewhere, adds nothing."""
    R, D, F, E, k = 40, 8, 12, 5, 2
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(R, D)), dtype)
    chosen = jnp.asarray(np.stack([rng.permutation(E + 1)[:k] for _ in range(R)]), jnp.int32)
    share = jnp.asarray(rng.uniform(size=(R, k)), jnp.float32)
    w = ExpertWeights(*(quantized(drawn(*s, seed=i)) for i, s in enumerate(((E, F, D), (E, F, D), (E, D, F)))))
    means = ExpertWeights(*(meaning(m, dtype) for m in w))
    near = SUM_ORDER if dtype == jnp.float32 else 4 * BFLOAT16      # these means are rounded, and h as well
    g = jnp.asarray(rng.normal(size=(R, D)), jnp.float32)

    @jax.jit
    def run(x, w):
        out = experts(x, share, chosen, w)
        if experts is blocked_experts:      # for inference only
            return out, out
        return out, jax.grad(lambda x: jnp.sum(g * experts(x, share, chosen, w)))(x).astype(jnp.float32)

    for found, expected in zip(run(x, w), run(x, means), strict=True):
        assert relative(found, expected) <= near


def test_rows_of_an_embedding():
    table, ids = quantized(drawn(12, 16)), jnp.asarray([[0, 5], [11, 5]], jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = embed(ids, table, dtype=dtype)
        assert rows.dtype == dtype and (rows == meaning(table, dtype)[ids]).all()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind", ["dense", "moe", "tied"])
def test_trees(kind, stacked):
    """Every matrix of the model, and nothing else; abstract trees and specs are like the tree itself."""
    cfg = dataclasses.replace(CONFIGS["dense" if kind == "tied" else kind], tied=kind == "tied")
    params = init_params(cfg, jax.random.key(0), stacked=stacked)
    tree = quantize(params)
    leaves = flat(tree)
    plain = {path for path, leaf in leaves.items() if not isinstance(leaf, Int8)}
    assert {path.rpartition("/")[2] for path in plain} == {"scale", "q_bias", "k_bias", "v_bias"} | (
        {"router", "shared_router"} if kind == "moe" else set())
    assert len(plain) < len(leaves) - 4
    described = jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(cfg, stacked=stacked, quant="int8"))
    specs = param_specs(cfg, make_mesh("fsdp=2,tensor=2"), stacked=stacked, quant="int8")
    for path, spec in flat(specs).items():
        leaf = leaves[path]
        assert isinstance(spec, Int8) == isinstance(leaf, Int8)
        if isinstance(spec, Int8):
            assert len(spec.values) == leaf.values.ndim and tuple(spec.scale) == tuple(spec.values)[:-1]
    assert (quant_of(tree), quant_of(params)) == ("int8", None)
    for path, leaf in flat(dequantize(tree)).items():
        original = flat(params)[path]
        step = leaves[path].scale[..., None] if path not in plain else 0
        assert leaf.dtype == jnp.float32 and (jnp.abs(leaf - original) <= 0.51 * step).all()


def test_refused_by_name():
    tree = quantize({"q": jnp.ones((2, 4))})
    with pytest.raises(UserError, match="quant 'int4' is not supported: int8 is"):
        check_quant("int4")
    with pytest.raises(UserError, match="here: a checkpoint takes the weights themselves, found a tree quantized"):
        refuse_quantized({"params": tree}, "here: a checkpoint")
    refuse_quantized({"params": dequantize(tree)}, "here")
