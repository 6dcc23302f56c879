"""Choosing a mesh: arithmetic first, then the compiler for the few that look best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen2_jax.errors import UserError
from qwen2_jax.plan.estimate import Estimate, Sizes, candidates
from qwen2_jax.plan.plan import Plan, Say, make_plan
from qwen2_jax.plan.program import Task
from qwen2_jax.plan.topology import Topology, slices
from qwen2_jax.sharding.mesh import parse_mesh

MOST_COMPILED = 3
ROUGHNESS = 1.4
"""An estimate may be this much too high: below it, a mesh is worth compiling."""


@dataclass(frozen=True)
class Fitting:
    """The smallest slice of a generation on which a task fits, by estimate."""

    topology: Topology
    sizes: Sizes
    peak_bytes: float


def best_plans(model: str, task: Task, topology: Topology, *, say: Say) -> list[Plan]:
    """At most MOST_COMPILED plans over all devices of a topology: those that fit, the fastest first; where none does,
    the one that needs least. Raises UserError: no mesh divides rows, tokens and heads."""
    found = candidates(task, topology)
    if not found:
        raise UserError(f"no mesh over the {topology.devices} devices of {topology} divides --batch {task.batch}, "
                        f"--seq {task.seq} and the model's {task.cfg.heads} heads; take another --batch, or a --mesh "
                        "of fewer devices")
    room = ROUGHNESS * topology.chip.hbm_bytes
    chosen = [e for e in found if e.peak_bytes <= room][:MOST_COMPILED]
    if not chosen:
        chosen = [min(found, key=lambda e: e.peak_bytes)]
    say(f"{len(found)} meshes are possible; compiling {', '.join(str(e.sizes) for e in chosen)}")
    plans = [make_plan(model, task, topology, str(e.sizes), say=say) for e in chosen]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return [min(plans, key=lambda plan: plan.peak_bytes)]
    return sorted(fitting, key=lambda plan: plan.predicted_seconds or 0.0)


def smallest_that_fits(plan: Plan) -> Fitting | None:
    """For a plan that does not fit: the smallest mesh of its generation that does, by estimates scaled so that this
    plan's own comes out as the compiler says, if it was asked. None where not even the largest slice would do."""
    chip, task = plan.topology.chip, plan.task
    own = next((e for e in candidates(task, plan.topology) if _same_mesh(e, plan)), None)
    scale = plan.peak_bytes / own.peak_bytes if own and plan.compiled else 1.0
    for topology in sorted((t for t in slices() if t.chip is chip), key=lambda t: t.devices):
        fitting = [e for e in candidates(task, topology) if e.peak_bytes * scale <= chip.hbm_bytes]
        if fitting and not (topology.devices == plan.mesh_devices and own and own.sizes == fitting[0].sizes):
            return Fitting(topology, fitting[0].sizes, fitting[0].peak_bytes * scale)
    return None


def _same_mesh(estimate: Estimate, plan: Plan) -> bool:
    wanted = {name: size for name, factors in parse_mesh(plan.mesh).items() if (size := math.prod(factors)) > 1}
    return wanted == {name: size for name, size in estimate.sizes.__dict__.items() if size > 1}
