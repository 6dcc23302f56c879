"""bfloat16 arrays stay whole on CPU: reading or writing a slice in a loop neither widens nor copies the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.model.cache import empty_cache
from qwen2_jax.model.decoder import Decoder, abstract_params
from qwen2_jax.ops.bits import as_bits, bits_dtype, from_bits
from qwen2_jax.ops.experts import ExpertWeights, blocked_experts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bits_come_back(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -2e30, jnp.inf, jnp.nan], dtype)
    bits = as_bits(x)
    assert bits.dtype == bits_dtype(dtype) and bits.dtype.itemsize == x.dtype.itemsize
    np.testing.assert_array_equal(np.asarray(from_bits(bits, dtype)).view(np.uint8), np.asarray(x).view(np.uint8))


def temporary_bytes(program, *args, **options) -> int:
    return jax.jit(program, **options).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("start", [(), (4,)], ids=["one slot for all", "a slot each"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_decoding_step_leaves_the_cache_in_place(dtype, start):
    cfg = ModelConfig(vocab=64, layers=2, d_model=32, d_ff=32, heads=4, kv_heads=2, head_dim=32, tied=True,
                      norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=8192)
    cache = jax.eval_shape(lambda: empty_cache(cfg, 4, 8192, dtype, stacked=False))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(cfg, stacked=False))

    def step(params, ids, cache, start):
        decoder = Decoder(cfg, dtype=dtype, stacked=False, train=False)
        out = decoder.apply({"params": params}, ids, cache=cache, start=start)
        return out.x_BTD, out.cache

    used = temporary_bytes(step, params, jax.ShapeDtypeStruct((4, 1), jnp.int32), cache,
                           jax.ShapeDtypeStruct(start, jnp.int32), donate_argnums=2)
    one_layer = cache["layers_0"]["k"].size * cache["layers_0"]["k"].dtype.itemsize
    assert used < one_layer / 2, f"{used} bytes for a step over keys of {one_layer} a layer"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_experts_stay_as_they_are(dtype):
    E, F, D, R, k = 64, 96, 64, 8, 2
    w = ExpertWeights(*(jax.ShapeDtypeStruct(s, dtype) for s in ((E, F, D), (E, F, D), (E, D, F))))
    x, weight, expert = (jax.ShapeDtypeStruct(*spec) for spec in
                         (((R, D), dtype), ((R, k), jnp.float32), ((R, k), jnp.int32)))
    used = temporary_bytes(blocked_experts, x, weight, expert, w)
    one_matrix = E * F * D * jnp.dtype(dtype).itemsize
    assert used < one_matrix / 2, f"{used} bytes beside matrices of {one_matrix}"
