"""Do the devices answer, and how fast do they talk to one another: a round trip over each axis of a mesh, timed."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen2_jax.sharding.axes import MESH_AXES, Axes
from qwen2_jax.sharding.mesh import per_device, slice_of, torus

EVERY_AXIS = P(MESH_AXES)
MODULUS = 251
"""Test data are whole numbers below it, so that sums over any number of devices are exact in float32."""


class RoundTrip(NamedTuple):
    """One mesh axis: a buffer gathered from all devices along it, then summed and scattered back."""

    axis: str
    devices: int
    crosses_slices: bool
    buffer_bytes: int
    """The gathered buffer, on each device."""
    gather_seconds: float
    """Median of the repetitions, from the host's call to the result's being there."""
    scatter_seconds: float
    gather_bandwidth: float
    """Bytes a second that a device must receive at least: (devices - 1) / devices of the buffer, over the seconds."""
    scatter_bandwidth: float
    exact: bool
    """Whether what came back is the sum of what was sent, to the bit."""


def device_facts() -> dict[str, Any]:
    """This process's devices and what is known of all. Starts JAX; raises what JAX raises."""
    everyone = jax.devices()
    slices = {slice_of(d) for d in everyone}
    first = [d for d in everyone if slice_of(d) == min(slices)]
    return {
        "backend": jax.default_backend(), "device_kind": everyone[0].device_kind, "devices": len(everyone),
        "processes": jax.process_count(), "slices": len(slices), "torus": list(torus(first)),
        "local": [_device(d) for d in jax.local_devices()],
    }


def _device(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:      # not every backend counts
        stats = {}
    return {"id": device.id, "coords": list(getattr(device, "coords", ())) or None,
            "memory_bytes": stats.get("bytes_limit"), "used_bytes": stats.get("bytes_in_use")}


def round_trips(mesh: Mesh, *, buffer_bytes: int, repeats: int) -> list[RoundTrip]:
    """Measures each axis of the mesh, the others taking part side by side. All processes must call it together.

    Args:
      buffer_bytes: size of the gathered buffer on a device; rounded down to whole float32s of each device.
      repeats: timed repetitions, after one that compiles and one that warms up.
    """
    return [_round_trip(mesh, name, buffer_bytes, repeats) for name in mesh.axis_names]


def _round_trip(mesh: Mesh, name: str, buffer_bytes: int, repeats: int) -> RoundTrip:
    n = mesh.shape[name]
    piece = max(1, buffer_bytes // (4 * n))

    def start(*, ax: Axes):
        """Another number in every place: what a device mixes up does not come out right."""
        first = ax.index(mesh.axis_names) * piece
        return ((first + jnp.arange(piece, dtype=jnp.int32)) % MODULUS).astype(jnp.float32)

    def gather(x, *, ax: Axes):
        return ax.gather(x, (name,), 0)

    def scatter(x, *, ax: Axes):
        return ax.scatter(x, (name,), 0)

    def differing(sent, back, *, ax: Axes):
        """Every device sent the same gathered buffer, so that the sum is `n` times each piece."""
        wrong = jnp.sum((back != sent * jnp.float32(n)).astype(jnp.int32))
        return ax.psum(ax.vary(wrong, mesh.axis_names), mesh.axis_names)

    def compiled(fn, *specs, out=EVERY_AXIS):
        return jax.jit(per_device(fn, mesh, specs, out))

    sent = compiled(start)()
    whole, gather_seconds = _timed(compiled(gather, EVERY_AXIS), sent, repeats)
    back, scatter_seconds = _timed(compiled(scatter, EVERY_AXIS), whole, repeats)
    wrong = int(np.asarray(compiled(differing, EVERY_AXIS, EVERY_AXIS, out=P())(sent, back).addressable_data(0)))
    received = 4 * piece * (n - 1)
    return RoundTrip(name, n, _crosses_slices(mesh, name), 4 * piece * n, gather_seconds, scatter_seconds,
                     received / gather_seconds, received / scatter_seconds, wrong == 0)


def _timed(fn, x, repeats: int) -> tuple[jax.Array, float]:
    out = jax.block_until_ready(fn(x))
    jax.block_until_ready(fn(x))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = jax.block_until_ready(fn(x))
        seconds.append(time.perf_counter() - began)
    return out, statistics.median(seconds)


def _crosses_slices(mesh: Mesh, name: str) -> bool:
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index(name), 0).reshape(mesh.shape[name], -1)
    return any(len({slice_of(d) for d in line}) > 1 for line in lines.T)


def default_mesh(devices: int, slices: int) -> str:
    """All devices: slices along `data`, the devices of a slice along `fsdp`, which follows the torus by itself."""
    return f"data={slices},fsdp={devices // slices}" if slices > 1 else f"fsdp={devices}"
