"""Plans of real programs, compiled for a TPU topology: memory is the compiler's, the ledger an independent count."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import pytest

from qwen2_jax.plan.plan import make_plan
from qwen2_jax.plan.program import Task, lower, mesh_of
from qwen2_jax.plan.topology import parse_topology, tpu_devices
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.compiler import serving_options

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = [pytest.mark.usefixtures("no_compilation_cache"), pytest.mark.slow, pytest.mark.optax]

CFG = dataclasses.replace(PRESETS["Qwen2-7B"], layers=2, vocab=4096, d_model=512, d_ff=1024, heads=4, kv_heads=2)
TASKS = {"train": Task(cfg=CFG, mode="train", seq=512, batch=4),
         "decode": Task(cfg=CFG, mode="decode", seq=512, batch=4)}
TOPOLOGY, MESH = parse_topology("v5e:2x2"), "fsdp=2,tensor=2"


@pytest.fixture(scope="module", params=TASKS)
def planned(request):
    task = TASKS[request.param]
    with jax.numpy_dtype_promotion("standard"):     # for Optax, as the mark says, which comes too late for a fixture
        return task, make_plan("small", task, TOPOLOGY, MESH, say=lambda line: None)


def test_memory_is_the_compilers_own(planned):
    task, plan = planned
    mesh = mesh_of(MESH, tpu_devices(TOPOLOGY))
    options = serving_options(mesh) if task.mode == "decode" else None
    memory = lower(task, mesh).lowered.compile(compiler_options=options).memory_analysis()
    assert (plan.argument_bytes, plan.temp_bytes, plan.peak_bytes) == (
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes)
    assert plan.fits


def test_the_ledger_is_that_of_an_independent_count(planned):
    """Lines of text, each weighed by the loop whose body it stands in; fused collectives by their starts."""
    task, plan = planned
    turns, callers = {}, {}
    current = ""
    for line in plan.text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            current = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"))[0]
            turns[current] = 1
        for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
            callers[called] = (current, " while(" in line)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
            callers |= {name.strip(" %"): (current, False) for name in branches.split(",")}

    def weight(computation: str) -> int:
        caller, looped = callers.get(computation, (None, False))
        if caller is None:
            return 1
        layers = looped and "Decoder" in scope_of[computation] and "attn" not in scope_of[computation]
        return weight(caller) * (task.cfg.layers if layers else 1)

    scope_of = {name: "" for name in turns}
    for line in plan.text.splitlines():
        if " while(" in line and (found := re.search(r"body=%?([\w.\-]+).*op_name=\"([^\"]*)\"", line)):
            scope_of[found[1]] = found[2]
    counted: Counter[str] = Counter()
    for line in plan.text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            current = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"))[0]
        found = re.search(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
        if not found or '"flag_start":"2"' in line or re.search(r"replica_groups=\[\d+,1\]", line):
            continue
        kind = "reduce-scatter" if found[1] == "all-reduce" and "all-reduce-scatter" in current else found[1]
        counted[kind] += weight(current)
    ours: Counter[str] = Counter()
    for row in plan.collectives or []:
        ours[row.kind] += row.count
    assert ours == counted


def test_time_is_the_sum_of_its_parts(planned):
    task, plan = planned
    found = plan.plain()
    assert found["predicted_seconds"] == (found["fusion_seconds"] + found["kernel_seconds"]
                                          + found["exposed_collective_seconds"]) > 0
    assert (found["kernel_seconds"] > 0) == (task.mode == "train"), "attention over whole rows is a kernel"
    assert 0 < found["predicted_mfu"] < 1
