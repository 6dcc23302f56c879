"""Experts: both products against a loop over tokens, whatever the routing, and the balancing loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.ops.experts import (
    ROW_BLOCK,
    ExpertWeights,
    RouterStats,
    blocked_experts,
    grouped_experts,
    load_balancing_loss,
    route,
    router_stats,
)

SUM_ORDER = 5e-6
"""Absolute, for results of size 1 in float32 summed in another order."""
R, D, F, E, K = 40, 8, 12, 5, 2

grouped, blocked = jax.jit(grouped_experts), jax.jit(blocked_experts)


def weights(seed: int = 0, dtype=np.float32) -> ExpertWeights:
    rng = np.random.default_rng(seed)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return ExpertWeights(*(jnp.asarray(rng.normal(size=s) / np.sqrt(s[-1]), dtype) for s in shapes))


def rows(seed: int = 1, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(R, D)), dtype)


def by_loop(x_RD, weight_Rk, expert_Rk, w: ExpertWeights) -> np.ndarray:
    gate, up, down = (np.asarray(m, np.float64) for m in w)
    out = np.zeros((R, D))
    for r, x in enumerate(np.asarray(x_RD, np.float64)):
        for weight, e in zip(weight_Rk[r], expert_Rk[r], strict=True):
            g = gate[e] @ x
            out[r] += weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x)))
    return out


@settings(max_examples=15, deadline=None)
@given(used=st.integers(K, E), seed=st.integers(0, 1000))
def test_both_products_equal_the_loop(used, seed):
    """Any load: experts without a row, and (used = k) all rows on the same experts, more than a block of them."""
    rng = np.random.default_rng(seed)
    expert_Rk = np.stack([rng.permutation(used)[:K] for _ in range(R)]).astype(np.int32)
    weight_Rk = rng.uniform(size=(R, K)).astype(np.float32)
    x, w = rows(seed), weights(seed)
    expected = by_loop(x, weight_Rk, expert_Rk, w)
    np.testing.assert_allclose(grouped(x, weight_Rk, expert_Rk, w), expected, atol=SUM_ORDER)
    np.testing.assert_allclose(blocked(x, weight_Rk, expert_Rk, w), expected, atol=SUM_ORDER)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_of_blocked_experts_does_not_depend_on_its_company(dtype):
    """To the last bit: other rows of the same expert, other loads, another order. `R` itself stays the same."""
    x, w = rows(dtype=dtype), weights(dtype=dtype)
    rng = np.random.default_rng(2)
    expert_Rk = np.stack([rng.permutation(E)[:K] for _ in range(R)]).astype(np.int32)
    weight_Rk = rng.uniform(size=(R, K)).astype(np.float32)
    out = blocked(x, weight_Rk, expert_Rk, w)
    order = rng.permutation(R)
    np.testing.assert_array_equal(blocked(x[order], weight_Rk[order], expert_Rk[order], w), out[order])
    crowd = np.where(np.arange(R)[:, None] < 3, expert_Rk, expert_Rk[:1])
    np.testing.assert_array_equal(blocked(x, weight_Rk, crowd, w)[:3], out[:3])
    assert (crowd == expert_Rk[0, 0]).sum() > 2 * ROW_BLOCK


def test_order_of_experts_is_a_name_only():
    """Experts and the router's rows permuted together: the same result, the statistics permuted."""
    x, w = rows(), weights()
    router = np.random.default_rng(3).normal(size=(E, D)).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    results = []
    for router_ED, experts in ((router, w), (router[order], ExpertWeights(*(m[order] for m in w)))):
        weight_Rk, expert_Rk, probability_RE = route(x, jnp.asarray(router_ED), top_k=K, normalise=False)
        stats = router_stats(expert_Rk, probability_RE, jnp.ones(R, bool))
        results.append((grouped(x, weight_Rk, expert_Rk, experts), stats))
    (plain, stats), (permuted, permuted_stats) = results
    np.testing.assert_allclose(plain, permuted, atol=SUM_ORDER)
    np.testing.assert_array_equal(stats.assigned_E[order], permuted_stats.assigned_E)
    np.testing.assert_allclose(stats.probability_E[order], permuted_stats.probability_E, rtol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_route(normalise):
    x = rows()
    router = jnp.asarray(np.random.default_rng(3).normal(size=(E, D)), jnp.float32)
    weight_Rk, expert_Rk, probability_RE = route(x, router, top_k=K, normalise=normalise)
    z = np.asarray(x, np.float64) @ np.asarray(router, np.float64).T
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(probability_RE, p, rtol=1e-5)
    np.testing.assert_array_equal(expert_Rk, np.argsort(-p, axis=-1)[:, :K])
    expected = np.take_along_axis(p, np.asarray(expert_Rk), -1)
    if normalise:
        expected = expected / expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weight_Rk, expected, rtol=1e-5)


def test_balancing_loss_of_known_loads():
    """Balanced: k. All on the same k experts with certainty: E. Rows that do not count are not counted."""
    even = RouterStats(jnp.full(E, 20.0 * K / E), jnp.full(E, 20.0 / E), jnp.array(20.0))
    assert float(load_balancing_loss(even)) == pytest.approx(K, rel=1e-6)
    expert_Rk = jnp.zeros((R, K), jnp.int32).at[:, 1].set(1)
    probability_RE = jnp.zeros((R, E)).at[:, 0].set(0.5).at[:, 1].set(0.5)
    counts = jnp.arange(R) < 7
    stats = router_stats(expert_Rk, probability_RE, counts)
    assert stats.rows == 7 and stats.assigned_E.tolist() == [7, 7, 0, 0, 0]
    assert float(load_balancing_loss(stats)) == pytest.approx(E, rel=1e-6)
    assert float(load_balancing_loss(RouterStats(jnp.zeros(E), jnp.zeros(E), jnp.zeros(())))) == 0


def test_gradients_in_bfloat16_stay_near_float32():
    """Rounding products to bfloat16 costs a few steps of 2^-8; the wrong group's matrix would cost everything."""
    rng = np.random.default_rng(2)
    expert_Rk = np.stack([rng.permutation(E)[:K] for _ in range(R)]).astype(np.int32)
    weight_Rk = rng.uniform(size=(R, K)).astype(np.float32)

    def total(x, w):
        return jnp.sum(jnp.sin(grouped_experts(x, weight_Rk, expert_Rk, w)))

    exact = jax.grad(total, (0, 1))(rows(), weights())
    rounded = jax.grad(total, (0, 1))(rows(dtype=jnp.bfloat16), weights(dtype=jnp.bfloat16))
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) <= 0.02 * jnp.linalg.norm(b)
