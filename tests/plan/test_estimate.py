"""Choosing meshes by arithmetic: state against the shapes that JAX makes, and what is ruled out."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.model.decoder import abstract_params, param_specs
from qwen2_jax.plan.chips import CHIPS, GIB
from qwen2_jax.plan.estimate import STATE, Sizes, candidates, estimate
from qwen2_jax.plan.program import Task
from qwen2_jax.plan.topology import parse_topology
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.axes import TRAINED
from qwen2_jax.sharding.mesh import make_mesh, shardings

FEW_PER_CENT = 0.03
"""Replicated biases and norms, and sizes that are not divided."""
DENSE = dataclasses.replace(PRESETS["Qwen2-7B"], layers=2)
SPARSE = dataclasses.replace(PRESETS["Qwen2-57B-A14B"], layers=2)


def held(cfg, mesh) -> int:
    """Parameters of one device in training, as `sharding/rules.py` places them."""
    where = shardings(param_specs(cfg, mesh, spread_over=TRAINED), mesh)
    return sum(math.prod(s.shard_shape(leaf.shape))
               for leaf, s in zip(jax.tree.leaves(abstract_params(cfg)), jax.tree.leaves(where), strict=True))


@pytest.mark.parametrize(("cfg", "sizes"), [
    (DENSE, Sizes(fsdp=8)), (DENSE, Sizes(fsdp=2, tensor=4)), (DENSE, Sizes(data=2, tensor=4)),
    (SPARSE, Sizes(fsdp=2, expert=4)), (SPARSE, Sizes(expert=4, tensor=2)),
], ids=str)
def test_state_is_what_the_rules_place(cfg, sizes):
    found = estimate(Task(cfg=cfg, mode="train", seq=512, batch=8), sizes, CHIPS["v5e"])
    assert found.argument_bytes == pytest.approx(STATE * held(cfg, make_mesh(str(sizes))), rel=FEW_PER_CENT)


def test_decoding_holds_weights_and_cache():
    cfg = PRESETS["Qwen2-7B"]
    found = estimate(Task(cfg=cfg, mode="decode", seq=1024, batch=8), Sizes(data=2, tensor=4), CHIPS["v5e"])
    cache = 2 * 28 * 4 * 1 * 1024 * 128 * jnp.dtype("bfloat16").itemsize    # one key-value head, four rows
    assert found.argument_bytes == pytest.approx(2 * 7_615_616_512 / 4 + cache, rel=FEW_PER_CENT)


def test_int8_halves_the_weights():
    task = Task(cfg=PRESETS["Qwen2-7B"], mode="decode", seq=128, batch=1)
    small, whole = (estimate(dataclasses.replace(task, quant=q), Sizes(), CHIPS["v6e"]) for q in ("int8", None))
    assert small.argument_bytes == pytest.approx(whole.argument_bytes / 2, rel=FEW_PER_CENT)


def test_meshes_divide_rows_and_heads_and_use_every_device():
    found = candidates(Task(cfg=PRESETS["Qwen2-7B"], mode="train", seq=4096, batch=8), parse_topology("v5e-16"))
    assert found
    for sizes in (e.sizes for e in found):
        assert math.prod(dataclasses.astuple(sizes)) == 16
        assert 8 % sizes.rows == 0 and 28 % sizes.tensor == 0 and sizes.expert == 1


def test_a_mesh_that_nothing_divides():
    assert candidates(Task(cfg=PRESETS["Qwen2-7B"], mode="decode", seq=128, batch=3), parse_topology("v5e-256")) == []


def test_what_cannot_fit_is_seen():
    """1.5 billion parameters of twelve bytes, on 15.75 GiB."""
    (only,) = candidates(Task(cfg=PRESETS["Qwen2-1.5B"], mode="train", seq=4096, batch=1), parse_topology("v5e-1"))
    assert only.peak_bytes > 1.1 * CHIPS["v5e"].hbm_bytes > 17 * GIB


def test_longer_rows_need_more():
    task = Task(cfg=PRESETS["Qwen2-7B"], mode="train", seq=4096, batch=16)
    few, many = (estimate(dataclasses.replace(task, seq=n), Sizes(fsdp=16), CHIPS["v5e"]) for n in (4096, 32768))
    assert many.temp_bytes > 2 * few.temp_bytes and many.seconds > 8 * few.seconds
