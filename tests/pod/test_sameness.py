"""Loss, gradients, three optimizer steps and greedy text are those of one device, whatever the mesh.

A covering set of the table that `make pod` runs: each axis alone, and axes in pairs.
"""

from __future__ import annotations

import pytest

from qwen2_jax.ops import dot
from qwen2_jax.sharding.axes import Axes
from tools.sameness import CASES as table
from tools.sameness import EXCHANGED, MESHES, MODELS, beyond, difference, on_one_device

CASES = (
    ("dense", "data=2"), ("dense untied", "fsdp=2x2x2"), ("dense untied", "tensor=4"), ("dense", "tensor=8"),
    ("dense untied", "context=8"), ("dense", "fsdp=2x2,tensor=2"), ("dense", "context=4,tensor=2"),
    ("dense untied", "data=2,context=2,tensor=2"),
    ("moe", "expert=8"), ("moe untied", "fsdp=2,expert=2,tensor=2"), ("moe", "expert=2,context=2"),
    ("moe untied", "tensor=8"),
)

pytestmark = [pytest.mark.slow, pytest.mark.optax]


@pytest.mark.parametrize("model, mesh", CASES)
def test_as_on_one_device(model, mesh):
    assert beyond(difference(MODELS[model], mesh)) == []


@pytest.mark.parametrize("mesh", EXCHANGED[1:3])
def test_tokens_exchanged_as_on_one_device(mesh):
    assert beyond(difference(MODELS["moe"], mesh, exchange="all_to_all")) == []


@pytest.mark.parametrize("model, mesh", [("dense untied", "fsdp=2x2,tensor=2"), ("moe", "fsdp=8")])
def test_gradients_by_hops_as_on_one_device(model, mesh, monkeypatch):
    """As TPUs send them, on CPU."""
    on_one_device(MODELS[model])    # remembered, from before what follows
    monkeypatch.setattr(Axes, "on_tpu", True)
    monkeypatch.setattr(dot, "RING_LEAST", 0)
    assert beyond(difference(MODELS[model], mesh)) == []


def test_the_set_covers_every_axis_and_is_part_of_the_table():
    assert {mesh for _, mesh in CASES} <= set(MESHES) and len(set(MESHES)) >= 20
    assert len(set(table)) == 2 * len(MESHES) and {model for model, _ in table} == set(MODELS)
    for family in ("dense", "moe"):
        named = ",".join(mesh for model, mesh in CASES if model.startswith(family))
        wanted = ("fsdp", "context", "tensor") + (("data",) if family == "dense" else ("expert",))
        assert all(f"{axis}=" in named for axis in wanted)
