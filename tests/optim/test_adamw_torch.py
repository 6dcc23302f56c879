"""Three and ten training steps against torch.optim.AdamW with transformers' decay groups, at a constant rate."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from qwen2_jax.optim.adamw import AdamWConfig, decays
from tests.optim.torch_training import (
    CASES,
    DECAY,
    SETTINGS,
    Run,
    adamw,
    decayed_names,
    errors,
    our_run,
    torch_run,
)
from tests.oracle import random_model, to_params

pytestmark = pytest.mark.parity

TOLERANCE = {3: 1e-3, 10: 5e-3}
"""Updates → relative L2 of each tensor's total update. Float32 gradients of two frameworks differ by about 1e-6 of a
tensor's norm; Adam divides each element by its own size, so small elements show that much larger, and more with each
step from weights that differ already."""
LOSS_TOLERANCE = 1e-5   # relative, of every step


@functools.cache
def theirs(case: str) -> Run:
    return torch_run(CASES[case], lambda model: [adamw(model)])


@functools.cache
def ours(case: str, **changes) -> Run:
    return our_run(CASES[case], theirs(case).before, AdamWConfig(**(SETTINGS | changes)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", TOLERANCE)
def test_updates_equal_torch(case, steps):
    found = errors(ours(case), theirs(case), steps)
    assert max(found.values()) <= TOLERANCE[steps], found


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_torch(case):
    np.testing.assert_allclose(ours(case).losses, theirs(case).losses, rtol=LOSS_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", TOLERANCE)
def test_the_tolerance_sees_one_percent(case, steps):
    assert min(errors(ours(case), theirs(case), steps, scale=0.99).values()) > TOLERANCE[steps]


MUTATIONS = {"decay doubled": {"weight_decay": 2 * DECAY}, "no decay": {"weight_decay": 0.0},
             "no clip": {"clip": None}, "b1": {"b1": 0.8}, "b2": {"b2": 0.999}}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_setting_fails(name):
    found = errors(ours("dense, tied", **MUTATIONS[name]), theirs("dense, tied"), 3)
    assert max(found.values()) > TOLERANCE[3]


@pytest.mark.parametrize("case", CASES)
def test_decay_groups_are_those_of_transformers(case):
    cfg, model = CASES[case], random_model(CASES[case])
    decayed = decayed_names(model)
    named = {name: np.full(p.shape, name in decayed) for name, p in model.named_parameters()}
    mask = jax.tree.map(lambda m: bool(m.all()), to_params(named, cfg))
    found = jax.tree.map(bool, decays(mask))
    assert found == mask
    assert {True, False} == set(jax.tree.leaves(found))
