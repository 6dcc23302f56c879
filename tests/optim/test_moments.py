"""Rounding at random is right on average, and moments held in bfloat16 train like float32's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer
from qwen2_jax.optim.moments import round_at_random
from qwen2_jax.optim.muon import MuonConfig

DRAWS = 2000
SPACING = 2.0 ** -7     # between neighbours of bfloat16 from 1 to 2

rounded = jax.jit(round_at_random)
many = jax.jit(jax.vmap(round_at_random, in_axes=(None, 0)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_up_as_often_as_the_part_cut_off_says(share):
    x = jnp.asarray([1.25 + share * SPACING, -(1.25 + share * SPACING)], jnp.float32)
    found = np.asarray(many(x, jnp.arange(DRAWS)), np.float32)
    assert set(np.unique(np.abs(found))) <= {1.25, 1.25 + SPACING}
    up = (np.abs(found) > 1.25).mean(0)
    np.testing.assert_allclose(up, share, atol=4 * np.sqrt(0.25 / DRAWS))     # four standard deviations


def test_neighbours_draw_for_themselves():
    """Values that differ in their last bits alone go up or down independently, within an update too."""
    x = jnp.asarray(1.25 + SPACING / 2 + np.arange(DRAWS) * 2.0 ** -23, jnp.float32)
    up = np.asarray(rounded(x, jnp.int32(3)), np.float32) > 1.25
    np.testing.assert_allclose(up.mean(), 0.5, atol=4 * np.sqrt(0.25 / DRAWS))
    assert abs(np.corrcoef(up[1:], up[:-1])[0, 1]) < 4 / np.sqrt(DRAWS)


def test_what_bfloat16_holds_stays_and_what_is_not_finite_too():
    x = np.asarray([0.0, 1.0, -2.5, 2.0 ** -100, np.inf, -np.inf, np.nan, 0, 0], np.float32)
    x.view(np.uint32)[-2:] = 0x7FFFFFFF, 0xFFFFFFFF     # NaNs that a carry would turn into numbers
    for count in range(5):
        np.testing.assert_array_equal(np.asarray(rounded(x, jnp.int32(count)), np.float32), x)


def test_a_second_moment_falls_although_it_falls_by_less_than_its_last_digit():
    """b2 = 0.999 without gradients: rounded to nearest it would stay where it is for ever."""
    params, start = {"embed": {"table": jnp.zeros((64, 8))}}, jnp.linspace(1, 2, 512).reshape(64, 8)
    optimizer = make_optimizer(AdamWConfig(peak=1e-3, steps=10, b2=0.999, moments="bfloat16"))
    zero, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    state = jax.tree.map(lambda leaf: start.astype(leaf.dtype) if leaf.shape == start.shape else leaf, state)
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (optimizer.update(zero, s, params)[1], None), s, length=500)
                       )(state)
    nu = np.asarray(optax.tree.get(state, "nu")["embed"]["table"], np.float32)
    expected = 0.999 ** 500 * float(start.mean())
    assert nu.mean() == pytest.approx(expected, rel=5e-3)       # an element strays by 3 %, the mean by a 22nd of that


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig])
def test_a_small_problem_is_learned_as_with_float32(kind):
    """Least squares with noisy gradients: the same distance to the solution after 300 updates, on average."""
    rng = np.random.default_rng(0)
    goal = jnp.asarray(rng.normal(size=(1, 24, 16)), jnp.float32)
    params = {"layers_0": {"mlp": {"up": jnp.zeros_like(goal)}}, "embed": {"table": jnp.zeros_like(goal[0])}}
    noise = jnp.asarray(rng.normal(size=(300, 24, 16)), jnp.float32)

    def far(moments):
        optimizer = make_optimizer(kind(peak=0.03, steps=300, weight_decay=0.0, b2=0.99, moments=moments, clip=None))

        def update(carry, noise):
            params, state = carry
            gradient = jax.tree.map(lambda p: p - goal.reshape(p.shape) + 0.3 * noise.reshape(p.shape), params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (found, state), _ = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), noise))(params)
        held = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32}
        assert held == {jnp.dtype(moments)}
        return {jax.tree_util.keystr(path): float(jnp.linalg.norm(leaf - goal.reshape(leaf.shape)))
                for path, leaf in jax.tree_util.tree_leaves_with_path(found)}

    exact, narrow = far("float32"), far("bfloat16")
    start = float(jnp.linalg.norm(goal))
    for path in exact:
        assert exact[path] < start / 2
        assert narrow[path] == pytest.approx(exact[path], rel=0.03) and narrow[path] != exact[path]
