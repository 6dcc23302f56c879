"""Schedules by their definition, the decay mask by transformers' rule, refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.errors import UserError
from qwen2_jax.optim.adamw import AdamWConfig, decays, make_optimizer, schedule


def config(**changes) -> AdamWConfig:
    return AdamWConfig(**(dict(peak=1.0, steps=100, warmup=10, final=0.1) | changes))


EXPECTED = {
    "cosine": {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 77: 0.55 + 0.45 * math.cos(math.pi * 67 / 90), 100: 0.1},
    "linear": {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 77: 1 - 0.9 * 67 / 90, 100: 0.1, 200: 0.1},
    "constant": {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0, 1000: 1.0},
    "wsd": {0: 0.1, 9: 1.0, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1},
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_schedule(kind):
    rate = schedule(config(schedule=kind, decay=20))
    for n, value in EXPECTED[kind].items():
        assert float(rate(n)) == pytest.approx(value, rel=1e-5), n


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(sorted(EXPECTED)), warmup=st.integers(0, 50), final=st.floats(0, 1))
def test_rates_rise_to_the_peak_and_never_again(kind, warmup, final):
    rates = np.asarray(schedule(config(schedule=kind, warmup=warmup, final=final, decay=30))(jnp.arange(120)))
    assert (np.diff(rates[:warmup]) > 0).all() and rates.max() == pytest.approx(1.0)
    assert (np.diff(rates[warmup:]) <= 1e-6).all() and rates.min() >= 0


TREE = {
    "embed": {"table": jnp.ones((3, 2))},
    "layers_0": {"attn_norm": {"scale": jnp.ones((2, 2))},
                 "attn": {"q": jnp.ones((2, 2, 2)), "q_bias": jnp.ones((2, 2))},
                 "moe": {"router": jnp.ones((2, 3, 2)), "shared_router": jnp.ones((2, 1, 2))}},
    "reward": {"dense1": jnp.ones((2, 2)), "dense1_bias": jnp.ones((2,))},
    "norm": {"scale": jnp.ones((2,))},
}


def test_only_matrices_decay():
    cfg = config(peak=0.5, warmup=0, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(cfg)
    zero = jax.tree.map(jnp.zeros_like, TREE)
    updates, _ = optimizer.update(zero, optimizer.init(TREE), TREE)
    exempt = {"scale", "q_bias", "dense1_bias"}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        np.testing.assert_allclose(update, 0.0 if path[-1].key in exempt else -0.5 * 0.2, rtol=1e-6, err_msg=str(path))
    assert jax.tree.structure(decays(TREE)) == jax.tree.structure(TREE)


def test_clip_scales_the_whole_gradient():
    params = {"a": {"w": jnp.zeros((2,))}, "b": {"w": jnp.zeros((1,))}}
    gradient = {"a": {"w": jnp.array([3.0, 0.0])}, "b": {"w": jnp.array([4.0])}}
    optimizer = make_optimizer(config(clip=1.0, b1=0.0, warmup=0))
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    [mu] = [s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
            if isinstance(s, optax.ScaleByAdamState)]
    np.testing.assert_allclose(mu["a"]["w"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(mu["b"]["w"], [0.8], rtol=1e-6)


REFUSED = {
    "schedule": ("step", "cosine, linear, constant, wsd"), "peak": (0.0, "peak"), "eps": (math.nan, "eps"),
    "weight_decay": (-0.1, "weight_decay"), "b1": (1.0, "b1"), "b2": (math.nan, "b2"), "final": (1.5, "final"),
    "clip": (0.0, "clip"), "steps": (0, "steps"), "warmup": (101, "warmup 101"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refusals_name_the_field(field):
    value, message = REFUSED[field]
    with pytest.raises(UserError, match=message):
        config(**{field: value})


def test_wsd_needs_a_decay():
    with pytest.raises(UserError, match="decay between 1 and steps - warmup = 90, found 0"):
        config(schedule="wsd")
