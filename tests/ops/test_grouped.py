"""Sorted copies, their products, and rounds: against plain indexing, whatever the routing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.ops.grouped import collect, in_rounds, of_choices, sorted_copies, spread

SUM_ORDER = 5e-6
"""Absolute, for results of size 1 in float32 summed in another order."""
R, K, E, D, F = 12, 3, 4, 5, 6
ROUTINGS = st.lists(st.integers(0, E + 1), min_size=R * K, max_size=R * K).map(
    lambda flat: np.array(flat, np.int32).reshape(R, K))
"""Any expert for any choice, also those that are not here."""


SIZE = 10


def pulled(fn, g, *args):
    """(value, gradients of <value, g>)."""
    value, back = jax.vjp(fn, *args)
    return value, back(g)


sort = jax.jit(sorted_copies, static_argnums=1)


@settings(max_examples=20)
@given(ROUTINGS)
def test_copies_are_sorted_by_group_and_in_order(group_Rk):
    copies = sort(group_Rk, E)
    order = np.argsort(group_Rk.reshape(-1), kind="stable")
    here = int((group_Rk < E).sum())
    np.testing.assert_array_equal(copies.copy_C[:here], order[:here])
    np.testing.assert_array_equal(np.diff(copies.ends_E, prepend=0), np.bincount(group_Rk.flat, minlength=E + 2)[:E])
    slot_C, copy_C = np.asarray(copies.slot_Rk).reshape(-1), np.arange(R * K)
    present_C = group_Rk.reshape(-1) < E
    np.testing.assert_array_equal(np.asarray(copies.copy_C)[slot_C[present_C]], copy_C[present_C])
    assert (slot_C[~present_C] >= R * K).all()


@jax.jit
def moved(group_Rk, start, x_RD, y_SD, weight_Rk):
    part = sorted_copies(group_Rk, E).part(start, SIZE)
    spread_x, back = jax.vjp(lambda x: spread(x, part), x_RD)
    collected, forth = jax.vjp(lambda y: collect(y, part), y_SD)
    weights, weights_back = jax.vjp(lambda w: of_choices(w, part), weight_Rk)
    return (part, spread_x, back(y_SD)[0], collected, forth(x_RD)[0], weights, weights_back(y_SD[:, 0])[0])


@settings(max_examples=20)
@given(ROUTINGS, st.integers(0, R * K))
def test_spreading_and_collecting_are_transposes(group_Rk, start):
    """<spread x, y> = <x, collect y> over the copies of a part; each is the other's gradient."""
    draw = np.random.default_rng(0)
    x, y, weight = (draw.integers(-9, 9, s).astype(np.float32) for s in ((R, D), (SIZE, D), (R, K)))
    part, spread_x, x_slope, collected, y_slope, weights, weight_slope = moved(group_Rk, start, x, y, weight)
    own = np.arange(SIZE) < part.ends_E[-1]
    rows = np.argsort(group_Rk.reshape(-1), kind="stable")[start:start + SIZE][own[:R * K - start]] // K
    np.testing.assert_array_equal(spread_x[own], x[rows])
    assert np.sum(x[rows] * y[own]) == np.sum(x * collected)
    np.testing.assert_array_equal(x_slope, collected)
    np.testing.assert_array_equal(y_slope[own], x[rows])
    np.testing.assert_array_equal(weights[own], weight.reshape(-1)[part.copy_C[own]])
    assert np.sum(weights[own] * y[own, 0]) == np.sum(weight * weight_slope)


def _shifted(part, x_RD, w_EFD):
    w_CFD = w_EFD[jnp.searchsorted(part.ends_E, jnp.arange(part.copy_C.shape[0]), side="right")]
    return collect(jnp.sin(jnp.einsum("cd,cfd->cf", spread(x_RD, part), w_CFD)), part)


@pytest.mark.parametrize("size", [1, 5, R * K])
def test_rounds_add_up_to_the_whole(size):
    """Value and gradients do not depend on how much a round takes, nor on how many copies are here; none included."""
    draw = np.random.default_rng(2)
    x, w, g = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((R, D), (E, F, D), (R, F)))

    @jax.jit
    def both(group_Rk):
        copies = sorted_copies(group_Rk, E)
        found = pulled(lambda *a: in_rounds(_shifted, size, copies, *a), g, x, w)
        return found, in_rounds(_shifted, size, copies, x, w), pulled(lambda *a: _shifted(copies, *a), g, x, w)

    for present in (0.0, 0.3, 1.0):
        here = draw.random((R, K)) < present
        found, alone, whole = both(jnp.asarray(np.where(here, draw.integers(0, E, (R, K)), E), jnp.int32))
        for a, b in zip(jax.tree.leaves((found, alone)), jax.tree.leaves((whole, whole[0])), strict=True):
            np.testing.assert_allclose(a, b, atol=SUM_ORDER)
