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
    _, plan = planned
    ours: Counter[str] = Counter()
    for row in plan.collectives or []:
        ours[row.kind] += row.count
    assert ours == counted(plan.text)


COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
CARRIED_ON = re.compile(r'"flag_start":"\d')      # a fused collective's steps and end; -1 is its start


def counted(text: str) -> Counter[str]:
    """Collectives by kind: lines of text, each weighed by the loops around it, whose bound is the largest number in
    their condition."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and line[:1] in "%E":
            name = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"))[0]
        computations.setdefault(name, []).append(line)
    callers: dict[str, tuple[str, int]] = {}
    for caller, lines in computations.items():
        for line in lines:
            if " while(" in line:
                condition, body = (re.search(rf"{word}=%?([\w.\-]+)", line)[1] for word in ("condition", "body"))
                bounds = [int(n) for row in computations[condition] for n in re.findall(r"constant\((\d+)\)", row)]
                callers[body] = caller, max(bounds, default=1)
            inner = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                inner += re.split(r"[, %]+", branches)
            callers |= {other: (caller, 1) for other in inner if other not in callers}

    def runs(computation: str) -> int:
        caller, times = callers.get(computation, ("", 1))
        return times * (runs(caller) if caller else 1)

    found: Counter[str] = Counter()
    for computation, lines in computations.items():
        for line in lines:
            if (match := COLLECTIVE.search(line)) and not CARRIED_ON.search(line):
                scatters = match[1] == "all-reduce" and "all-reduce-scatter" in computation
                found["reduce-scatter" if scatters else match[1]] += runs(computation)
    return found


def test_time_is_the_sum_of_its_parts(planned):
    task, plan = planned
    found = plan.plain()
    assert found["predicted_seconds"] == (found["fusion_seconds"] + found["kernel_seconds"]
                                          + found["exposed_collective_seconds"]) > 0
    assert (found["kernel_seconds"] > 0) == (task.mode == "train"), "attention over whole rows is a kernel"
    assert 0 < found["predicted_mfu"] < 1
