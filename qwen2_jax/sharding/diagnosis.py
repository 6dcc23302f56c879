"""What is wrong, in words: from facts of every host (`host.host_facts`, `health.device_facts`) to sentences.

Each sentence says what was found, on which host, and what to do. Standard library only.
"""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

SLOW = 4.0
"""An axis this many times slower than the median of the others is named. Axes of a healthy torus differ too: a ring of
16 with a wrap-around link has two ways where a line of two devices has one."""
LEAST_DISK = 1 << 30
"""Bytes free below which checkpoints and caches are about to fail."""
SAME_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
                 "JAX_THREEFRY_PARTITIONABLE", "JAX_NUM_CPU_DEVICES")
"""Settings that change the program a host compiles: where they differ, collectives of unlike programs wait for ever."""

Host = Mapping[str, Any]


def before_start(hosts: Sequence[Host]) -> list[str]:
    """What is wrong with these hosts before a device is touched; `hosts[i]` is process i's."""
    found = []
    for number, host in enumerate(hosts):
        found += [f"{place(hosts, number)}: {text}" for text in _of_host(host)]
    for name in sorted({name for host in hosts for name in host["versions"]}):
        found += _differing(hosts, name, [host["versions"].get(name) or "not installed" for host in hosts])
    for name in SAME_SETTINGS:
        found += _differing(hosts, name, [host["settings"].get(name) or "not set" for host in hosts])
    return found


def blocked(hosts: Sequence[Host]) -> bool:
    """Whether starting JAX would fail or wait for ever: a TPU has one process at a time."""
    return any(host["tpu_holders"] for host in hosts)


def place(hosts: Sequence[Host], number: int) -> str:
    """A host's name; with the process's number where there are several."""
    return hosts[number]["host"] if len(hosts) == 1 else f"{hosts[number]['host']} (process {number})"


def _of_host(host: Host) -> list[str]:
    found = []
    chips, libtpu, wanted = host["tpu_chips"], host["versions"]["libtpu"], host["libtpu_wanted"]
    platforms = host["settings"].get("JAX_PLATFORMS")
    if chips and libtpu is None:
        found.append(f"there are {chips} TPU chips, but libtpu is not installed, so JAX cannot use them: install "
                     "qwen2_jax[tpu]")
    if libtpu and wanted and not satisfies(libtpu, wanted):
        found.append(f"libtpu {libtpu} does not belong to JAX {host['versions']['jax']}, which wants {wanted}: "
                     "reinstall qwen2_jax[tpu]")
    for holder in host["tpu_holders"]:
        found.append(f"process {holder['pid']} ({_short(holder['command'])}) holds the TPU "
                     f"({', '.join(holder['files'])}): end it first, a TPU has one process at a time")
    if host["tpu_lockfile"] and chips and not host["tpu_holders"]:
        found.append("/tmp/libtpu_lockfile is there, but no process of yours that holds the TPU: if no other "
                     "user's job runs (sudo lsof -w /dev/accel* /dev/vfio/*), remove it: sudo rm /tmp/libtpu_lockfile")
    if chips and platforms and "tpu" not in platforms.split(","):
        found.append(f"JAX_PLATFORMS={platforms} keeps JAX from the {chips} TPU chips: unset it")
    if (free := host["disk"]["free"]) < LEAST_DISK:
        found.append(f"{free >> 20} MiB are free on the disk of {host['disk']['folder']}: make room for checkpoints")
    if host["cache"]["folder"] and not host["cache"]["writable"]:
        found.append(f"the compilation cache {host['cache']['folder']} cannot be written, so that every start compiles "
                     "anew: set JAX_COMPILATION_CACHE_DIR to another folder")
    return found


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version of plain numbers meets a requirement such as "==0.0.42.*" or ">=0.10,<0.11"."""
    comparisons: dict[str, Callable[[Any, Any], bool]] = {
        ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(==|~=|!=|>=|<=|>|<)\s*([\w.*]+)\s*", part)
        if match is None:
            continue
        sign, number = match.groups()
        mine, bound = _numbers(version), _numbers(number)
        if sign in comparisons:
            good = comparisons[sign](mine, bound)
        elif sign == "~=":
            good = mine >= bound and mine[:len(bound) - 1] == bound[:-1]
        else:
            same = mine[:len(bound)] == bound if number.endswith(".*") else mine == bound
            good = same == (sign == "==")
        if not good:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(p) for p in takewhile(str.isdecimal, version.split(".")))


def _differing(hosts: Sequence[Host], what: str, values: Sequence[str]) -> list[str]:
    if len(set(values)) < 2:
        return []
    groups: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        groups.setdefault(value, []).append(place(hosts, number))
    told = "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())
    return [f"{what} differs between hosts: {told}: make them the same, or programs that must match will not"]


def of_devices(hosts: Sequence[Host], devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong once JAX has started, or failed to; `devices[i]` is `device_facts()` or {"error": text}."""
    found = []
    for number, (host, seen) in enumerate(zip(hosts, devices, strict=True)):
        if "error" in seen:
            found.append(f"{place(hosts, number)}: JAX cannot start its devices: {seen['error']}")
        elif seen["backend"] == "cpu" and not _asked_for_cpu(host):
            if host["tpu_chips"]:
                found.append(f"{place(hosts, number)}: JAX runs on the CPU, although the machine has "
                             f"{host['tpu_chips']} TPU chips")
            elif host["gpu"]:
                found.append(f"{place(hosts, number)}: JAX runs on the CPU, although the machine has an NVIDIA GPU: "
                             "install qwen2_jax[cuda]")
    working = [seen for seen in devices if "error" not in seen]
    if len({seen["device_kind"] for seen in working}) > 1:
        found += _differing(hosts, "device kind", [seen.get("device_kind", "none") for seen in devices])
    if len({len(seen["local"]) for seen in working}) > 1:
        found += _differing(hosts, "number of devices", [str(len(seen.get("local", ()))) for seen in devices])
    if working and any(seen["processes"] != len(hosts) for seen in working):
        found.append(f"JAX counts {working[0]['processes']} processes, there are {len(hosts)}: the TPU runtime was "
                     "told of another slice (TPU_PROCESS_BOUNDS, TPU_WORKER_HOSTNAMES)")
    return found


def _asked_for_cpu(host: Host) -> bool:
    return host["settings"].get("JAX_PLATFORMS") == "cpu"


def of_round_trips(trips: Sequence[Any], backend: str) -> list[str]:
    """What is wrong with the links; `trips` are `health.RoundTrip`s. Host devices share one memory, and are not
    compared."""
    found = [f"axis {t.axis}: what came back is not the sum of what was sent: a chip or a link corrupts data; replace "
             "this slice" for t in trips if not t.exact]
    if backend == "cpu":
        return found
    for trip in trips:
        others = [min(t.gather_bandwidth, t.scatter_bandwidth) for t in trips
                  if t is not trip and not t.crosses_slices]
        own = min(trip.gather_bandwidth, trip.scatter_bandwidth)
        if others and not trip.crosses_slices and own * SLOW < statistics.median(others):
            found.append(f"axis {trip.axis} moves {own / 1e9:.2f} GB/s a device where the other axes move "
                         f"{statistics.median(others) / 1e9:.2f}: it does not lie along the torus, or a link is bad; "
                         "give fsdp one factor for each dimension of the torus")
    return found


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"
