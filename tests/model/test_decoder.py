"""Properties of the whole decoder: who sees whom, what padding, packing, batches and mesh may change (nothing)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model.cache import cache_slots, cache_spec, empty_cache
from qwen2_jax.model.decoder import Decoder, init_params
from qwen2_jax.ops.experts import load_balancing_loss
from qwen2_jax.ops.vocab import logits, target_logprobs
from qwen2_jax.sharding.axes import BATCH, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, make_mesh, per_device

SUM_ORDER = 2e-5
"""Relative, float32: the same numbers added in another order."""

DENSE = ModelConfig(vocab=40, layers=2, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=8, tied=True, norm_eps=1e-6,
                    rope=RopeConfig(theta=1e4), max_position=64, init_std=0.4,
                    window=WindowConfig(enabled=True, size=6, max_window_layers=1))
MOE = dataclasses.replace(DENSE, tied=False, moe=MoeConfig(experts=4, top_k=2, d_expert=8, d_shared=12))
CONFIGS = {"dense": DENSE, "experts": MOE}


@functools.cache
def params_of(name: str):
    """Weights with biases and scales off their initial values."""
    params = init_params(CONFIGS[name], jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)


@functools.cache
def program(name: str):
    """(params, ids, segments, positions) → logits, compiled once for each shape."""
    decoder = Decoder(CONFIGS[name])

    def run(params, ids_BT, segments_BT, positions_BT):
        out = decoder.apply({"params": params}, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        return logits(out.x_BTD, out.head["table"])

    return functools.partial(jax.jit(run), params_of(name))


def whole_rows(seed: int, B: int = 2, T: int = 12):
    ids = np.random.default_rng(seed).integers(0, 40, (B, T)).astype(np.int32)
    return ids, np.ones_like(ids), np.broadcast_to(np.arange(T, dtype=np.int32), ids.shape)


def assert_near(a, b):
    np.testing.assert_allclose(a, b, atol=SUM_ORDER * float(np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(seed=st.integers(0, 99), at=st.integers(1, 11))
def test_no_token_sees_a_later_one(name, seed, at):
    ids, *rest = whole_rows(seed)
    changed = ids.copy()
    changed[:, at:] = (changed[:, at:] + 1 + seed % 39) % 40     # another token at every place
    a, b = program(name)(ids, *rest), program(name)(changed, *rest)
    assert_near(a[:, :at], b[:, :at])
    assert np.abs(a - b)[:, at].max() > 1e-2


def test_causality_by_the_gradient():
    """∂ logits[t] / ∂ position of a later token is 0, of an earlier one not."""
    ids, _, positions = whole_rows(3, B=1, T=8)
    params = params_of("dense")

    def at(shift_T, t):
        # A real-valued position: the derivative by it tells whether the token at it was seen.
        out = Decoder(DENSE).apply({"params": params}, ids, positions_BT=positions.astype(np.float32) + shift_T[None])
        return jnp.sum(logits(out.x_BTD, out.head["table"])[0, t])

    gradient = jax.jit(jax.grad(at))
    for t in (0, 3, 7):
        g = np.asarray(gradient(jnp.zeros(8), t))
        assert not g[t + 1:].any()
        assert t == 0 or np.all(np.abs(g[:t]) > 0)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(seed=st.integers(0, 99), border=st.integers(1, 10), pad=st.integers(0, 6))
def test_packing_and_padding_change_nothing(name, seed, border, pad):
    """Two sequences in one row, with padding before and behind: each as if it were alone."""
    T = 18
    ids, *_ = whole_rows(seed, B=1)
    rows = np.zeros((3, 2, T), np.int32)    # ids, segments, positions
    second = ids[0, border:]
    for b, (tokens, segment, start) in enumerate([(ids[0, :border], 1, 0), (second, 1, pad)]):
        rows[:, b, start:start + len(tokens)] = tokens, np.full(len(tokens), segment), np.arange(len(tokens))
    alone = np.asarray(program(name)(*rows))
    packed = np.zeros((3, 2, T), np.int32)
    packed[0, 0, pad:pad + 12], packed[0, 1, :] = ids[0], 7
    packed[1, 0, pad:pad + 12] = np.where(np.arange(12) < border, 1, 2)
    packed[2, 0, pad:pad + 12] = np.where(np.arange(12) < border, np.arange(12), np.arange(12) - border)
    together = np.asarray(program(name)(*packed))
    assert_near(together[0, pad:pad + border], alone[0, :border])
    assert_near(together[0, pad + border:pad + 12], alone[1, pad:pad + 12 - border])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5)
@given(order=st.permutations(range(4)))
def test_order_of_rows_is_free(name, order):
    rows = whole_rows(5, B=4)
    order = np.array(order)
    assert_near(program(name)(*(r[order] for r in rows)), np.asarray(program(name)(*rows))[order])


def loss_and_grads(cfg: ModelConfig, mesh):
    """Mean nll plus the balancing loss over the global batch, differentiated through the map, as training does."""
    def sums(params, ids_BT, segments_BT, targets_BT, *, ax):
        out = Decoder(cfg, ax, remat="dots").apply({"params": params}, ids_BT, segments_BT=segments_BT)
        logprob_BT, _, _ = target_logprobs(out.x_BTD, out.head["table"], targets_BT)
        real_BT = (segments_BT > 0).astype(jnp.float32)
        return ax.psum((jnp.sum(logprob_BT * real_BT), real_BT.sum(), out.router), BATCH)

    mapped = per_device(sums, mesh, (REPLICATED, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC), REPLICATED)

    def loss(params, *batch):
        total, count, router = mapped(params, *batch)
        balance = 0.0 if router is None else load_balancing_loss(router)
        return -total / count + 0.1 * balance

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", CONFIGS)
def test_data_parallel_equals_one_device(name):
    """Loss and gradients on several devices whose rows hold unequal numbers of tokens."""
    cfg, params = CONFIGS[name], params_of(name)
    ids, targets = np.random.default_rng(7).integers(0, 40, (2, 8, 12)).astype(np.int32)
    segments = (np.arange(12) < np.array([12, 3, 7, 12, 1, 9, 12, 5])[:, None]).astype(np.int32)
    loss, grads = loss_and_grads(cfg, None)(params, ids, segments, targets)
    for devices in (2, 4, 8) if name == "dense" else (4,):
        mapped_loss, mapped_grads = loss_and_grads(cfg, make_mesh(f"data={devices}"))(params, ids, segments, targets)
        assert abs(mapped_loss / loss - 1) < SUM_ORDER
        for a, b in zip(jax.tree.leaves(mapped_grads), jax.tree.leaves(grads), strict=True):
            assert np.linalg.norm(b) > 0
            assert np.linalg.norm(a - b) <= SUM_ORDER * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_on_a_mesh(name, dtype):
    """Prefill and one token, rows spread over devices: the experts' product for inference and the cache's loop too."""
    cfg, dtype = CONFIGS[name], jnp.dtype(dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), params_of(name))
    ids, *_ = whole_rows(11, B=4)
    prompts_B = jnp.array([5, 11, 8, 2], jnp.int32)

    def run(params, ids_BT, start_B, cache, *, ax):
        decoder = Decoder(cfg, ax, dtype, train=False)
        cache = decoder.apply({"params": params}, ids_BT, cache=cache, start=jnp.int32(0)).cache
        out = decoder.apply({"params": params}, ids_BT[:, :1], cache=cache, start=start_B)
        return logits(out.x_BTD, out.head["table"])

    cache = empty_cache(cfg, 4, cache_slots(12), dtype, stacked=True)
    mesh = make_mesh("data=2")
    mapped = per_device(run, mesh, (REPLICATED, BATCH_SPEC, BATCH_SPEC, cache_spec(cfg, Axes.of(mesh))), BATCH_SPEC)
    alone = jax.jit(per_device(run, None, None, None))(params, ids, prompts_B, cache)
    spread = jax.jit(mapped)(params, ids, prompts_B, cache)
    # In bfloat16 another order of sums may move a number to its neighbour, 2^-8 away, and that on through two layers.
    tolerance = SUM_ORDER if dtype == jnp.float32 else 2.0**-6
    assert np.abs(alone - spread).max() <= tolerance * np.abs(alone).max()


def test_router_statistics_leave_out_padding():
    ids, _, positions = whole_rows(13)
    segments = np.ones_like(ids)
    segments[0, 5:] = 0

    def stats(ids_BT):
        return Decoder(MOE).apply({"params": params_of("experts")}, ids_BT, segments_BT=segments,
                                  positions_BT=positions).router

    found, other = stats(ids), stats(np.where(segments == 0, 39, ids))
    assert found.rows == (5 + 12) * MOE.layers
    assert found.assigned_E.sum() == found.rows * MOE.moe.top_k
    jax.tree.map(assert_near, found, other)


def test_what_a_decoder_refuses():
    ids, *_ = whole_rows(1)
    with pytest.raises(UserError, match="remat 'some' is not supported"):
        Decoder(DENSE, remat="some").apply({"params": params_of("dense")}, ids)
    cache = empty_cache(DENSE, 2, cache_slots(12), jnp.float32, stacked=True)
    with pytest.raises(ValueError, match="one token at a time"):
        Decoder(DENSE).apply({"params": params_of("dense")}, ids, cache=cache, start=jnp.zeros(2, jnp.int32))
