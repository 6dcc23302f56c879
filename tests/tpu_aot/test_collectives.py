"""What travels in a training step on a TPU's torus: weights are gathered, gradients scattered, none summed whole."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.model.decoder import abstract_params
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, make_mesh, shardings
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import TrainState, make_step
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = [pytest.mark.usefixtures("no_compilation_cache"), pytest.mark.slow, pytest.mark.optax]

CFG = dataclasses.replace(PRESETS["Qwen2-7B"], layers=2, vocab=4096, d_model=1024, d_ff=4096, heads=8, kv_heads=4)
OPTIM = AdamWConfig(peak=1e-5, steps=10)
SMALL = 64 * 2**10
"""Bytes: gradients of biases and norms are replicated, and so summed whole; no matrix is as small."""
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled_step(mesh, rows: int, tokens: int) -> str:
    loss, optimizer = NextTokenLoss(model=CFG, dtype="bfloat16", remat="full"), make_optimizer(OPTIM)
    whole = shardings(REPLICATED, mesh)

    def lying(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.tree.map(lying, abstract_params(CFG), shardings(loss.param_specs(mesh), mesh))
    moments = optax.tree.map_params(optimizer, lambda leaf, p: lying(leaf, p.sharding),
                                    jax.eval_shape(optimizer.init, params), params,
                                    transform_non_params=lambda leaf: lying(leaf, whole))
    ids, weights = (jax.ShapeDtypeStruct((rows, tokens), dtype, sharding=shardings(TOKENS_SPEC, mesh))
                    for dtype in (jnp.int32, jnp.float32))
    state = TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))
    step = make_step(loss, optimizer, schedule(OPTIM), mesh=mesh)
    return step.lower(state, PackedBatch(ids, ids, ids, ids, weights)).compile().as_text()


def ledger(hlo: str) -> list[tuple[str, int]]:
    """(kind, bytes of its largest array) of each collective. On TPU a reduce-scatter is an all-reduce in a fusion named
    all-reduce-scatter."""
    found, inside = [], ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line
        if match := COLLECTIVE.search(line):
            kind = "reduce-scatter" if match[2] == "all-reduce" and "scatter" in inside else match[2]
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) * BYTES[dtype]
                     for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            found.append((kind, max(sizes)))
    return found


@pytest.fixture(scope="module")
def devices():
    return tpu_devices("v5e:4x4")


def test_gradients_travel_as_reduce_scatters(devices):
    mesh = make_mesh("fsdp=8,tensor=2", devices)
    assert "fsdp_y" in mesh.axis_names, "fsdp is spread over the torus"
    found = ledger(compiled_step(mesh, 16, 1024))
    assert {"all-gather", "reduce-scatter"} <= {kind for kind, _ in found}
    assert [size for kind, size in found if kind == "all-reduce" and size > SMALL] == []


def test_the_ledger_sees_an_all_reduce(devices):
    """One long axis instead of two: the compiler sums whole gradients, and this test would say so."""
    mesh = jax.sharding.Mesh(make_mesh("fsdp=16", devices).devices.reshape(16), ("fsdp_x",),
                             axis_types=(jax.sharding.AxisType.Auto,))
    assert [size for kind, size in ledger(compiled_step(mesh, 16, 1024)) if kind == "all-reduce" and size > SMALL]
