"""A plan in words and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from qwen2_jax.plan.auto import Fitting
from qwen2_jax.plan.chips import CALIBRATED_LIBTPU, GIB
from qwen2_jax.plan.plan import Plan, mesh_text
from qwen2_jax.plan.topology import is_calibrated, libtpu_version

STEPS = {"train": "training step", "prefill": "prefill", "decode": "decoding step"}
MOST_PARTS = 8
MOST_BUFFERS = 5


def lines(plan: Plan) -> list[str]:
    """The whole report."""
    return [*_head(plan), "", *_memory(plan), *(_time(plan) if plan.fits else [])]


def warnings(plan: Plan) -> list[str]:
    """What to know before the numbers are trusted."""
    found, version = [], libtpu_version() or "unknown"
    if not is_calibrated(version):
        found.append(f"libtpu {version} was not calibrated ({CALIBRATED_LIBTPU} was): its seconds may mislead")
    if not plan.topology.chip.calibrated:
        found.append(f"the clock of {plan.topology.chip.name} was not calibrated: compare it with itself only")
    if plan.spent is not None and plan.spent.unknown:
        found.append(f"the compiler does not know the cycles of {plan.spent.unknown} operations; they count as nothing")
    return found


def _head(plan: Plan) -> list[str]:
    task, topology = plan.task, plan.topology
    name = f" ({topology.slice_name})" if topology.slice_name else ""
    rows = f"{_some(task.batch, 'row')} of {task.seq:,} tokens"
    if task.mode == "decode":
        rows = f"a token for {_some(task.batch, 'row')} with {task.seq:,} tokens in the cache"
    how = f", remat {task.remat}" if task.mode == "train" else ", int8 weights" if task.quant else ""
    chips = f"{_some(topology.chips, 'chip')}, {_some(topology.devices, 'JAX device')}"
    return [f"{plan.model}, {STEPS[task.mode]}: {rows}, computed in {task.dtype}{how}",
            f"{topology}{name}: {chips}; mesh {plan.mesh}"]


def _memory(plan: Plan) -> list[str]:
    chip = plan.topology.chip
    whole = f"{plan.peak_bytes / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB a device"
    if plan.fits:
        temporaries = _gib(plan.temp_bytes or 0)
        return [f"fits: needs {whole} (arguments {_gib(plan.argument_bytes)}, temporaries {temporaries})"]
    told = [f"does not fit: needs {whole} (arguments {_gib(plan.argument_bytes)})" if plan.compiled else
            f"does not fit: needs more than {whole} (arguments alone; not compiled)"]
    if plan.buffers:
        told += ["", "largest buffers", *table(
            ["", "GiB", "shape", "where"],
            [["", _gib(b.bytes), b.shape, _short(b.scope)] for b in plan.buffers[:MOST_BUFFERS]])]
    return told


def _time(plan: Plan) -> list[str]:
    found, seconds = plan.spent, plan.predicted_seconds
    if found is None or seconds is None:
        return []
    task = plan.task
    tokens = task.batch * (1 if task.mode == "decode" else task.seq)
    told = ["", f"predicted {duration(seconds)} a {'token' if task.mode == 'decode' else 'step'}: "
                f"{tokens / seconds:,.0f} tokens a second, MFU {plan.predicted_mfu or 0:.1%}"]
    if plan.bandwidth_share is not None:
        told[-1] += f", {plan.bandwidth_share:.0%} of what HBM's bandwidth allows"
    told += ["(the compiler's estimates and published figures; a prediction, never a measurement)", ""]
    whole = {"fusions": found.fusions, "kernels": found.kernels, "exposed collectives": plan.exposed_seconds or 0.0}
    told += table(["", "seconds", "share"], [[name, f"{part:.4g}", f"{part / seconds:.0%}"]
                                             for name, part in whole.items()])
    parts = sorted((found.by_part or {}).items(), key=lambda item: -item[1])[:MOST_PARTS]
    told += ["", "where computing goes", *table(["", "", "seconds", "share"], [
        [part, phase, f"{spent:.4g}", f"{spent / seconds:.0%}"] for (part, phase), spent in parts])]
    if plan.collectives:
        told += ["", "collectives (a device and step; GiB of full buffers)", *table(
            ["", "mesh axes", "torus", "count", "GiB", "sent GiB", "seconds", "exposed"],
            [[row.kind, "+".join(row.mesh_axes), "+".join(row.axes), f"{row.count:,}", _gib(row.bytes),
              _gib(row.wire_bytes), f"{row.seconds:.4g}", f"{row.exposed_seconds:.4g}"] for row in plan.collectives])]
    return told


def ranking(plans: Sequence[Plan]) -> list[str]:
    """Several plans that fit, the best first."""
    return ["meshes that were compiled and fit", *table(
        ["", "GiB", "predicted", "MFU"],
        [[plan.mesh, _gib(plan.peak_bytes), duration(plan.predicted_seconds or 0), f"{plan.predicted_mfu or 0:.1%}"]
         for plan in plans])]


def fitting(found: Fitting | None, plan: Plan) -> str:
    """What to take where a plan does not fit."""
    if found is None:
        return f"no slice of {plan.topology.chip.name} would do, by estimate"
    name = found.topology.slice_name or found.topology
    return (f"smallest mesh that fits: {found.sizes} on {name} ({found.topology}), about "
            f"{_gib(found.peak_bytes)} GiB a device (estimated, not compiled)")


def measured(seconds: Sequence[float], mesh: Mesh, plan: Plan | None) -> list[str]:
    """Measurement beside prediction."""
    middle, unit = statistics.median(seconds), len(seconds)
    device = mesh.devices.flat[0]
    told = [f"measured {duration(middle)} (median of {unit}, {duration(min(seconds))} to {duration(max(seconds))}) on "
            f"{mesh.size} x {device.device_kind}, mesh {mesh_text(mesh)}"]
    if plan is None or plan.predicted_seconds is None:
        return [*told, "no prediction: --topology names the slice to compare with"]
    predicted = plan.predicted_seconds
    told.append(f"predicted {duration(predicted)}: measured is {middle / predicted:.2f} times that")
    if device.platform != "tpu":
        told.append(f"the prediction is for {plan.topology}, the measurement of {device.platform}: they say nothing of "
                    "each other")
    return told


def measured_plain(seconds: Sequence[float], mesh: Mesh) -> dict[str, Any]:
    return {"measured_seconds": statistics.median(seconds), "measured_on": mesh.devices.flat[0].device_kind,
            "measured_devices": mesh.size, "measured_mesh": mesh_text(mesh)}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, numbers to the right."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(header))]
    return ["  " + "  ".join(cell.rjust(w) if right else cell.ljust(w)
                            for cell, w, right in zip(row, widths, numeric, strict=True)).rstrip() for row in rows]


def _is_number(text: str) -> bool:
    return text[:1].isdigit()


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _short(scope: str) -> str:
    """The last parts of a scope."""
    return "/".join(scope.split("/")[-3:])
