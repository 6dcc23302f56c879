"""A run that is killed and goes on is the run that was not killed, to the last bit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax.checkpoint.store import Store
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import init_params
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.sharding.mesh import BATCH_SPEC, make_mesh, place
from qwen2_jax.train.loop import Hook, fit
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.resume import SaveState, restore_state, stored_state
from qwen2_jax.train.step import init_state, make_step

OPTIM = AdamWConfig(peak=1e-2, steps=8, warmup=2)


class Losses(Hook):
    def __init__(self):
        self.seen = {}

    def on_metrics(self, step, metrics):
        self.seen[step] = (metrics["loss"], metrics["grad_norm"], metrics["learning_rate"])


class Run:
    """The pieces of one process: everything that is made anew after a kill."""

    def __init__(self, cfg, packed, *, stacked, mesh=None):
        self.mesh = make_mesh(mesh)
        loss, optimizer = NextTokenLoss(model=cfg, stacked=stacked), make_optimizer(OPTIM)
        self.cfg, self.packed = cfg, packed
        self.state = init_state(jax.jit(lambda key: init_params(cfg, key, stacked=stacked))(jax.random.key(0)),
                                optimizer, self.mesh, loss.param_specs(self.mesh))
        self.step = make_step(loss, optimizer, schedule(OPTIM), mesh=self.mesh)

    def go(self, start, stop, *hooks):
        losses = Losses()
        batches = (place(self.packed.batch(n, 8, seed=3), self.mesh, BATCH_SPEC) for n in range(start, stop))
        self.state, _ = fit(self.state, self.step, batches, start=start, stop=stop, hooks=[losses, *hooks])
        return losses.seen


class Killed(SaveState):
    """Does not save after the last step: the process never learned that it was."""

    def due(self, step, last):
        return super().due(step, last=False)


def save(cfg, store, *, every=100, kind=SaveState):
    return kind(store, cfg, lambda step: {"step": step}, every=every)


@pytest.mark.parametrize("stacked", [True, False])
def test_killed_and_resumed_is_bit_identical(cfg, packed, tmp_path, stacked):
    whole = Run(cfg, packed, stacked=stacked).go(0, 8)
    store = Store(tmp_path / "run")
    Run(cfg, packed, stacked=stacked).go(0, 5, save(cfg, store, every=3, kind=Killed))    # saved after 3
    store.close()

    resumed = Run(cfg, packed, stacked=stacked)
    store = Store(tmp_path / "run")
    resumed.state, position = restore_state(store, cfg, resumed.state)
    store.close()
    assert position == {"step": 3} and int(resumed.state.step) == 3
    again = resumed.go(position["step"], 8)
    assert again == {step: whole[step] for step in range(4, 9)}


def test_what_is_saved_is_the_state_of_that_step_although_training_goes_on(dense, packed, tmp_path):
    """The arrays are donated to the next step while they are being written."""
    copies = {}

    class Copy(Hook):
        def due(self, step, last):
            return True

        def after_step(self, step, state):
            copies[step] = jax.tree.map(np.array, state)

    store = Store(tmp_path / "run", keep=5)
    run = Run(dense, packed, stacked=True)
    like = Run(dense, packed, stacked=True).state
    run.go(0, 5, Copy(), save(dense, store, every=1))
    for step in range(1, 6):
        saved, _ = restore_state(store, dense, like, step)
        for found, expected in zip(jax.tree.leaves(saved), jax.tree.leaves(copies[step]), strict=True):
            np.testing.assert_array_equal(found, expected)
    store.close()


def test_another_layout_and_mesh_go_on_with_it(dense, packed, tmp_path):
    store = Store(tmp_path / "run")
    first = Run(dense, packed, stacked=False)
    first.go(0, 3, save(dense, store))
    other = Run(dense, packed, stacked=True, mesh="data=4")
    other.state, _ = restore_state(store, dense, other.state)
    store.close()
    again, expected = other.go(3, 6), first.go(3, 6)
    for step in expected:
        np.testing.assert_allclose(again[step], expected[step], rtol=1e-4)     # other order of sums, three updates


@pytest.mark.parametrize("saved, restored", [("fsdp=2x2,tensor=2", "data=2,tensor=4"), ("tensor=2", "fsdp=8"),
                                             ("fsdp=4", None)])
def test_restored_on_another_mesh(dense, packed, tmp_path, saved, restored):
    """The same bits, lying as the other mesh has them, whatever the layout."""
    first = Run(dense, packed, stacked=True, mesh=saved)
    store = Store(tmp_path / "run")
    first.go(0, 1, save(dense, store))
    other = Run(dense, packed, stacked=False, mesh=restored)
    placed = other.state
    other.state, _ = restore_state(store, dense, placed)
    store.close()
    for leaf, like in zip(jax.tree.leaves(other.state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    for found, expected in zip(jax.tree.leaves(stored_state(other.state, dense)),
                               jax.tree.leaves(stored_state(first.state, dense)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_another_model_is_refused(dense, packed, tmp_path):
    store = Store(tmp_path / "run")
    Run(dense, packed, stacked=True).go(0, 1, save(dense, store))
    wider = dataclasses.replace(dense, d_ff=32)
    with pytest.raises(UserError, match="mlp/down: the checkpoint has shape"):
        restore_state(store, wider, Run(wider, packed, stacked=True).state)
    store.close()
