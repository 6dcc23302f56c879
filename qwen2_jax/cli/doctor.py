"""`qwen2-jax doctor`: is this machine, or this pod, in order? Devices, versions, links between devices, and what is
wrong in words. Exit status 0: healthy; 2: something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from qwen2_jax.errors import UserError

WRONG = 2
ACCELERATOR_MIB, CPU_MIB = 64.0, 4.0
SECONDS = 120.0
"""How long process 0 waits for what another process has found; starting a large slice takes most of it."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor", help="devices, versions, links between devices, and what is wrong",
        description="Look at this machine, or at all hosts of a pod when started on each of them (docs/pods.md): "
                    "devices, versions, memory, and a timed round trip over each axis of a mesh. Exit status 0 when "
                    "healthy, 2 when something is wrong.",
    )
    parser.add_argument("--mesh", metavar="SPEC", help="axes to measure, like fsdp=4x4 or fsdp=2x2,tensor=2 (default: "
                                                       "fsdp over all devices, one axis a dimension of the torus)")
    parser.add_argument("--buffer-mib", type=float, metavar="N",
                        help=f"gathered buffer on each device (default: {ACCELERATOR_MIB:g}, on CPU {CPU_MIB:g})")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed repetitions (default: 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, found {args.repeats}")
    if args.buffer_mib is not None and not 0 < args.buffer_mib < 2**20:
        raise UserError(f"--buffer-mib must lie above 0 and below {2**20}, found {args.buffer_mib:g}")
    try:
        with _library_output_to_stderr():
            report = examine(args)
    except ImportError as e:
        raise UserError(f"JAX cannot be imported ({e}): install qwen2_jax again") from e
    if report is None:      # process 0 speaks for all
        return 0
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    return WRONG if report["wrong"] else 0


@contextlib.contextmanager
def _library_output_to_stderr() -> Iterator[None]:
    """Gloo greets its peers on stdout, where our result goes."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def examine(args: argparse.Namespace) -> dict[str, Any] | None:
    """All that the command tells, as plain data: on process 0, None on the others."""
    from qwen2_jax.sharding.host import host_facts

    mine = host_facts()     # before JAX is imported, which adds settings of its own

    from qwen2_jax.sharding import diagnosis, distributed

    distributed.start()
    hosts = distributed.exchange("host", mine, seconds=SECONDS)
    report: dict[str, Any] = {"hosts": hosts, "devices": [], "mesh": {}, "buffer_bytes": None, "repeats": args.repeats,
                              "round_trips": [], "wrong": diagnosis.before_start(hosts)}
    if diagnosis.blocked(hosts):
        return report if distributed.is_first() else None
    report["devices"] = devices = distributed.exchange("devices", _devices(), seconds=SECONDS)
    report["wrong"] += diagnosis.of_devices(hosts, devices)
    if not any("error" in seen for seen in devices):
        report["wrong"] += _measure(args, report, devices[0])
    return report if distributed.is_first() else None


def _devices() -> dict[str, Any]:
    from qwen2_jax.sharding.health import device_facts

    try:
        return device_facts()
    except Exception as e:      # whatever a runtime says: it is what we came for
        return {"error": (str(e).strip() or type(e).__name__).splitlines()[0]}


def _measure(args: argparse.Namespace, report: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """Fills in mesh and round trips; what is wrong with them."""
    from qwen2_jax.sharding import diagnosis
    from qwen2_jax.sharding.health import default_mesh, round_trips
    from qwen2_jax.sharding.mesh import make_mesh

    try:
        mesh = make_mesh(args.mesh or default_mesh(seen["devices"], seen["slices"]))
    except UserError as e:
        return [str(e)]
    if mesh is None or mesh.size == 1:
        return []
    report["mesh"] = dict(mesh.shape)
    mebibytes = args.buffer_mib or (CPU_MIB if seen["backend"] == "cpu" else ACCELERATOR_MIB)
    report["buffer_bytes"] = int(mebibytes * 2**20)
    trips = round_trips(mesh, buffer_bytes=report["buffer_bytes"], repeats=args.repeats)
    report["round_trips"] = [trip._asdict() for trip in trips]
    return diagnosis.of_round_trips(trips, seen["backend"])


def _lines(report: dict[str, Any]) -> list[str]:
    from qwen2_jax.sharding.diagnosis import place

    hosts, rows = report["hosts"], []
    for number, host in enumerate(hosts):
        rows.append(("host", f"{place(hosts, number)}, {host['system']}, {host['cpus']} CPUs{_chips(host)}"))
        rows += _of_devices(report["devices"][number] if report["devices"] else None)
        if number == 0 or host["versions"] != hosts[0]["versions"]:
            rows.append(("versions", ", ".join(f"{name} {v}" for name, v in host["versions"].items() if v)))
        rows += [("setting", f"{name}={value}") for name, value in host["settings"].items()
                 if number == 0 or hosts[0]["settings"].get(name) != value]
        if host["ram_bytes"]:
            free, total = host["ram_bytes"]["available"], host["ram_bytes"]["total"]
            rows.append(("memory", f"{_gib(free)} of {_gib(total)} free"))
        rows.append(("disk", f"{_gib(host['disk']['free'])} of {_gib(host['disk']['total'])} free at "
                             f"{host['disk']['folder']}"))
        rows.append(("cache", _cache(host["cache"])))
    lines = [f"{label:<9} {text}" for label, text in rows]
    if report["devices"] and "error" not in report["devices"][0]:
        lines[:0] = [f"{'all':<9} {_whole(report['devices'][0])}"]
    if report["round_trips"]:
        mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
        lines += ["", f"round trips on {mesh}, {report['buffer_bytes'] / 2**20:.4g} MiB a device, median of "
                      f"{report['repeats']}", f"{'axis':<10}{'devices':>8}{'all-gather':>24}{'reduce-scatter':>24}"]
        for trip in report["round_trips"]:
            cells = (f"{trip[f'{way}_seconds'] * 1e3:.3f} ms {trip[f'{way}_bandwidth'] / 1e9:8.2f} GB/s"
                     for way in ("gather", "scatter"))
            lines.append(f"{trip['axis']:<10}{trip['devices']:>8}" + "".join(f"{cell:>24}" for cell in cells)
                         + ("  between slices" if trip["crosses_slices"] else ""))
    wrong = report["wrong"]
    return [*lines, "", *([f"wrong: {text}" for text in wrong] or ["healthy"])]


def _whole(seen: dict[str, Any]) -> str:
    torus = "x".join(map(str, seen["torus"]))
    slices = f"{seen['slices']} slices, each " if seen["slices"] > 1 else ""
    shape = f", {slices}torus {torus}" if slices or seen["backend"] == "tpu" else ""
    return f"{seen['devices']} devices ({seen['device_kind']}, {seen['backend']}), {seen['processes']} processes{shape}"


def _of_devices(seen: dict[str, Any] | None) -> list[tuple[str, str]]:
    if seen is None or "error" in seen:
        return []
    local = seen["local"]
    sizes = {d["memory_bytes"] for d in local}
    memory = "memory not told" if None in sizes else f"{_gib(min(sizes))} each"
    used = [d["used_bytes"] or 0 for d in local]
    return [("devices", f"{len(local)}, {memory}" + (f", up to {_gib(max(used))} in use" if max(used) else ""))]


def _chips(host: dict[str, Any]) -> str:
    if host["tpu_chips"]:
        return f", {host['tpu_chips']} TPU chips" + (f" ({host['tpu_kind']})" if host["tpu_kind"] else "")
    return ", an NVIDIA GPU" if host["gpu"] else ""


def _cache(cache: dict[str, Any]) -> str:
    if cache["folder"] is None:
        return "off"
    return f"{cache['folder']}: {cache['entries']} programs, {cache['bytes'] / 2**20:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
