"""What travels in a training step on a TPU's torus: weights are gathered, gradients scattered, none summed whole."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import pytest

from qwen2_jax.plan.program import Task, lower
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.mesh import make_mesh
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = [pytest.mark.usefixtures("no_compilation_cache"), pytest.mark.slow, pytest.mark.optax]

CFG = dataclasses.replace(PRESETS["Qwen2-7B"], layers=2, vocab=4096, d_model=1024, d_ff=4096, heads=8, kv_heads=4)
SMALL = 64 * 2**10
"""Bytes: gradients of biases and norms are replicated, and so summed whole; no matrix is as small."""
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled_step(mesh, rows: int, tokens: int) -> str:
    return lower(Task(cfg=CFG, mode="train", seq=tokens, batch=rows), mesh).lowered.compile().as_text()


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
    assert {"all-gather", "reduce-scatter", "collective-permute"} <= {kind for kind, _ in found}
    assert [size for kind, size in found if kind == "all-reduce" and size > SMALL] == []


def test_weights_are_gathered_over_three_dimensions():
    found = ledger(compiled_step(make_mesh("fsdp=4x4x4", tpu_devices("v5p:4x4x4")), 64, 256))
    assert {"all-gather", "collective-permute"} <= {kind for kind, _ in found}
    assert [size for kind, size in found if kind == "all-reduce" and size > SMALL] == []


def test_the_ledger_sees_an_all_reduce(devices):
    """One long axis instead of two: the compiler sums whole gradients, and this test would say so."""
    mesh = jax.sharding.Mesh(make_mesh("fsdp=16", devices).devices.reshape(16), ("fsdp_x",),
                             axis_types=(jax.sharding.AxisType.Auto,))
    assert [size for kind, size in ledger(compiled_step(mesh, 16, 1024)) if kind == "all-reduce" and size > SMALL]
