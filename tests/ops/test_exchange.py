"""Experts by exchange: what they give where all rows and all experts are on one device, whatever the routing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.ops import experts
from qwen2_jax.ops.exchange import exchanged
from qwen2_jax.ops.experts import ExpertWeights, grouped_experts
from qwen2_jax.sharding.axes import EXPERT, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, P, make_mesh, per_device

SUM_ORDER = 5e-6
"""Absolute, for results of size 1 in float32 summed in another order."""
ROWS, K, E, D, F = 16, 2, 8, 8, 12
"""Rows of all devices together."""


@pytest.fixture(autouse=True, scope="module")
def small_rounds():
    """So that an expert that is liked too well takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "TILE", 2)
        patch.setattr(experts, "SMALLEST_ROUND", 1)
        yield


def weights() -> ExpertWeights:
    draw = np.random.default_rng(0)
    return ExpertWeights(*(jnp.asarray(draw.normal(size=s) / np.sqrt(s[-1]), jnp.float32)
                           for s in ((E, F, D), (E, F, D), (E, D, F))))


@jax.jit
def on_one_device(x, weight, expert, w, g):
    y, back = jax.vjp(lambda x, weight, w: grouped_experts(x, weight, expert, w), x, weight, w)
    return y, back(g)


class Untidy(Axes):
    """Leaves something behind what comes, as devices do that fill an array without clearing it."""

    def exchange(self, tree, counts_nn, names, rows, most):
        filled = jnp.arange(rows)[:, None] < counts_nn[:, self.index(names)].sum()

        def litter(x):
            return jnp.where(filled, x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 1)

        return jax.tree.map(litter, super().exchange(tree, counts_nn, names, rows, most))


def on_mesh(spec: str):
    mesh = make_mesh(spec)

    def local(x, weight, expert, w, *, ax):
        ax, n = Untidy(ax.sizes), ax.size(EXPERT)
        return exchanged(partial(grouped_experts, w=w, share=1 / n), E // n, x, weight, expert, ax)

    mapped = per_device(local, mesh, (BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, P(EXPERT)), BATCH_SPEC)

    @jax.jit
    def both(x, weight, expert, w, g):
        y, back = jax.vjp(lambda x, weight, w: mapped(x, weight, expert, w), x, weight, w)
        return y, back(g)

    return both


MESHES = {spec: on_mesh(spec) for spec in ("expert=2", "expert=4", "expert=8")}
"""Eight devices are more than choices: there the rows go in pieces."""


def check(spec: str, expert_Rk: np.ndarray) -> None:
    draw = np.random.default_rng(1)
    x, g = (jnp.asarray(draw.normal(size=(ROWS, D)), jnp.float32) for _ in range(2))
    args = x, jnp.asarray(draw.uniform(size=(ROWS, K)), jnp.float32), jnp.asarray(expert_Rk, jnp.int32), weights(), g
    found, expected = MESHES[spec](*args), on_one_device(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=SUM_ORDER)


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("routing", [(0, 1), (7, 6), (0, 7), (3, 4)], ids=str)
def test_all_rows_want_the_same(spec, routing):
    """One device gets everything, the others nothing; or two that do."""
    check(spec, np.tile(np.array(routing, np.int32), (ROWS, 1)))


@settings(max_examples=10)
@given(st.sampled_from(list(MESHES)), st.integers(K, E), st.integers(0, 1000))
def test_any_routing(spec, used, seed):
    """Among the first experts only, too: then some devices have none."""
    draw = np.random.default_rng(seed)
    check(spec, np.stack([draw.permutation(used)[:K] for _ in range(ROWS)]))
