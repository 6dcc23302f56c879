"""Meshes, and the only `shard_map` of the house."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import BATCH, Axes

BATCH_SPEC = P(BATCH)
REPLICATED = P()
SUPPORTED_AXES = ("data",)


def make_mesh(spec: str | Mesh | None) -> Mesh | None:
    """`"data=4"` → a mesh over the first four devices; None or "" → None, one device.

    Raises UserError for an axis that is unknown, repeated or not a positive number, or for more devices than there are.
    """
    if spec is None:
        return None
    if isinstance(spec, Mesh):
        for name in spec.axis_names:
            _check_axis(name, f"{dict(spec.shape)}")
        return spec
    if not isinstance(spec, str):
        raise UserError(f"mesh must be a text like 'data=4', a jax.sharding.Mesh or None, found {spec!r}")
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, size = part.partition("=")
        _check_axis(name, spec)
        if name in sizes:
            raise UserError(f"mesh axis '{name}' appears twice in '{spec}'")
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh axis '{name}' needs a positive whole number, found '{size}' in '{spec}'")
        sizes[name] = int(size)
    if not sizes:
        return None
    devices = jax.devices()
    need = 1
    for size in sizes.values():
        need *= size
    if need > len(devices):
        raise UserError(f"mesh '{spec}' needs {need} devices, this machine has {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:need],
                         axis_types=(AxisType.Auto,) * len(sizes))


def _check_axis(name: str, spec: str) -> None:
    if name not in SUPPORTED_AXES:
        raise UserError(f"mesh axis '{name}' in '{spec}' is not supported: {', '.join(SUPPORTED_AXES)} is")


def per_device(fn: Callable, mesh: Mesh | None, in_specs, out_specs) -> Callable:
    """`fn(*local_arrays, ax=Axes)` over global arrays: mapped over the mesh, or called directly when there is none.

    Take gradients *outside* of it: the variance check then types every collective, and the gradient of a replicated
    parameter is the sum over the devices that used it.
    """
    ax = Axes.of(mesh)

    def local(*args):
        return fn(*args, ax=ax)

    if mesh is None:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def place(tree, mesh: Mesh | None, spec: P = REPLICATED):
    """Put host arrays on the mesh (or the default device) under one partition spec."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    return jax.device_put(tree, NamedSharding(mesh, spec))
