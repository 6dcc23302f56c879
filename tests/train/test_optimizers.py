"""Muon, which holds other things of some parameters than of others, goes through the step: on a mesh as on one device,
in both layouts, to disk and back. AdamW does in test_resume.py."""

from __future__ import annotations

import functools

import jax
import numpy as np

from qwen2_jax.checkpoint.store import Store
from qwen2_jax.model.decoder import init_params
from qwen2_jax.model.params import stack
from qwen2_jax.optim.adamw import make_optimizer, schedule
from qwen2_jax.optim.muon import MuonConfig
from qwen2_jax.sharding.mesh import BATCH_SPEC, make_mesh, place, shardings
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.resume import restore_state, stored_state
from qwen2_jax.train.step import init_state, make_step

OPTIM = MuonConfig(peak=1e-2, steps=10, eps=1e-3, ns_dtype="float32", moments="bfloat16")
TOLERANCE = 1e-3
"""Of the largest element of a tensor's update: gradients are 1e-5 apart, and Muon multiplies what is small in them; a
large eps keeps Adam from doing so."""
MESH = "fsdp=2,tensor=2"


class Program:
    """A model's step and fresh state; `state` after some of the data's batches."""

    def __init__(self, cfg, packed, optim, *, stacked, mesh=None):
        self.packed, self.mesh = packed, make_mesh(mesh)
        loss = NextTokenLoss(model=cfg, stacked=stacked)
        specs = loss.param_specs(self.mesh)
        optimizer = make_optimizer(optim, None if self.mesh is None else shardings(specs, self.mesh))
        params = jax.jit(functools.partial(init_params, cfg, stacked=stacked))(jax.random.key(0))
        self.fresh = init_state(params, optimizer, self.mesh, specs)
        self.step = make_step(loss, optimizer, schedule(optim), mesh=self.mesh)

    def go(self, state, *batches):
        for n in batches:
            state, _ = self.step(state, place(self.packed.batch(n, 8, seed=3), self.mesh, BATCH_SPEC))
        return state


def test_mesh_layout_and_disk_do_not_change_training(dense, packed, tmp_path):
    """Two updates on one device, unstacked; and of one, saved, the second on a mesh, stacked."""
    one = Program(dense, packed, OPTIM, stacked=False)
    many = Program(dense, packed, OPTIM, stacked=True, mesh=MESH)
    _check_mirrors(many.fresh)
    given = one.fresh
    start = jax.tree.map(np.array, stack(given.params, dense))
    first = one.go(given, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given) if leaf.size), "the state was not donated"
    saved = jax.tree.map(np.array, stored_state(first, dense))
    store = Store(tmp_path / "run")
    store.save(1, stored_state(first, dense), {})
    restored, _ = restore_state(store, dense, many.fresh)
    back, _ = restore_state(store, dense, first)
    store.close()
    assert jax.tree.map(np.shape, restored) == jax.tree.map(np.shape, many.fresh)
    for state in (restored, back):
        jax.tree.map(np.testing.assert_array_equal, stored_state(state, dense), saved)
    jax.tree.map(np.testing.assert_array_equal, back, first)
    _check_mirrors(restored)

    found, expected = many.go(restored, 1).params, stack(one.go(first, 1).params, dense)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored) if leaf.size)
    for (path, a), b, s in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected),
                               jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b - s).max(), err_msg=jax.tree_util.keystr(path))


def _check_mirrors(state):
    """Both moments lie as the parameters do."""
    mirrors = [node for node in jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, dict))
               if isinstance(node, dict)]
    assert len(mirrors) == 2
    for mirror in mirrors:
        for moment, parameter in zip(jax.tree.leaves(mirror), jax.tree.leaves(state.params), strict=True):
            assert moment.sharding.is_equivalent_to(parameter.sharding, parameter.ndim)
