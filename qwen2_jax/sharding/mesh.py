"""Meshes, and the only `shard_map` of the house."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import BATCH, CONTEXT, FSDP, MESH_AXES, Axes

log = logging.getLogger("qwen2_jax")
NAMES = ("data", "fsdp", "expert", "context", "tensor")
"""What a mesh is written with; `fsdp` stands for one mesh axis a torus dimension."""
BATCH_SPEC = P(BATCH)
TOKENS_SPEC = P(BATCH, CONTEXT)
"""Of arrays [B, T, …]: rows over the batch axes, tokens over context."""
REPLICATED = P()


LONGEST = 20
"""Digits and letters of what was written that a message repeats, for one number."""


def parse_mesh(text: str) -> dict[str, tuple[int, ...]]:
    """`"fsdp=4x4,tensor=2"` → {"fsdp": (4, 4), "tensor": (2,)}, "" → {}; UserError for what is not of that form."""
    sizes: dict[str, tuple[int, ...]] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = part.partition("=")
        if name not in NAMES:
            raise UserError(f"mesh axis '{name}' in '{text}' is not supported: {', '.join(NAMES)} are")
        if name in sizes:
            raise UserError(f"mesh axis '{name}' appears twice in '{text}'")
        factors = size.split("x") if name == "fsdp" else [size]
        if not all(f.isascii() and f.isdecimal() and len(f) < LONGEST and int(f) for f in factors):
            raise UserError(f"mesh axis '{name}' needs a positive whole number, found '{size[:LONGEST]}' in "
                            f"'{text[:4 * LONGEST]}'")
        if len(factors) > len(FSDP):
            raise UserError(f"mesh axis 'fsdp' has at most {len(FSDP)} dimensions, found '{size}' in '{text}'")
        sizes[name] = tuple(map(int, factors))
    if text and not sizes:
        raise UserError(f"mesh '{text[:LONGEST]}' names no axis: write one like data=4 or fsdp=2x2,tensor=2")
    return sizes


def make_mesh(spec: str | Mesh | None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh as it is written, axes in any order, over the first of the devices (default: all of this program's).

    `"fsdp=2x2,tensor=2"`: the axes of `sharding.axes.MESH_AXES`, those of one device left out. `fsdp=4` is spread over
    the dimensions of the devices' torus; `fsdp=2x2` says how. None or "" → None: one device, no mesh. A `Mesh` is
    checked and, where it has axes of one device, returned without them.

    Where the devices are of several TPU slices, the outer part of `data` goes over these, and nothing else does.

    Raises UserError for an axis that is unknown, repeated or not a positive number, for more devices than there are,
    for a mesh that leaves a process without a device, or of which more than `data` would cross slices.
    """
    if spec is None:
        return None
    if isinstance(spec, Mesh):
        return _known(spec)
    if not isinstance(spec, str):
        raise UserError(f"mesh must be a text like 'data=4', a jax.sharding.Mesh or None, found {spec!r}")
    sizes = parse_mesh(spec)
    if not sizes:
        return None
    given, devices = devices is not None, list(jax.devices() if devices is None else devices)
    need = math.prod(itertools.chain.from_iterable(sizes.values()))
    if need > len(devices):
        raise UserError(f"mesh '{spec}' needs {need} devices, this machine has {len(devices)}")
    if not given and (idle := {d.process_index for d in devices} - {d.process_index for d in devices[:need]}):
        raise UserError(f"mesh '{spec}' takes {need} of {len(devices)} devices, and none of process "
                        f"{', '.join(map(str, sorted(idle)))}: start fewer processes, or take a larger mesh")
    slices = _slices(devices[:need], sizes.get("data", (1,))[0], spec)
    if len(sizes.get("fsdp", ())) == 1:
        sizes["fsdp"] = spread(sizes["fsdp"][0], torus(slices[0]))
    named = dict(zip(FSDP, sizes.pop("fsdp", ()), strict=False)) | {name: size for name, (size,) in sizes.items()}
    live = _live(named)
    outer, *inner = live.values()
    grid = np.concatenate([_along_torus((outer // len(slices), *inner), part, spec) for part in slices])
    return Mesh(grid, tuple(live), axis_types=(AxisType.Auto,) * len(live))


def _along_torus(sizes: tuple[int, ...], devices: Sequence[Any], spec: str) -> np.ndarray:
    """Devices as an array of these sizes, its dimensions along those of their torus where that can be."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except Exception:
        # It asserts that TPU chips fill a box, which the first 3 of 4 or 7 of 16 do not, and its greedy choice of
        # dimensions can end with none left, a TypeError (2x7x2 on 14x2). Any order is a right mesh; in this one
        # neighbours are mostly chips of one host.
        log.info("mesh '%s' does not lie along the chips' torus: devices are taken in their order", spec)
        return np.asarray(devices, dtype=object).reshape(sizes)


def _slices(devices: Sequence[Any], data: int, spec: str) -> list[list[Any]]:
    """Devices by the TPU slice they belong to, whose links are many times faster than the network between slices."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    counts = [len(part) for part in slices.values()]
    if data % len(counts) or len(set(counts)) > 1:
        raise UserError(f"mesh '{spec}' lies on {len(counts)} slices, of which it takes "
                        f"{' and '.join(map(str, counts))} devices: data must be a multiple of {len(counts)}, for only "
                        "data goes across slices")
    return list(slices.values())


def slice_of(device: Any) -> int:
    """The TPU slice of a device; other platforms count their hosts so, which are not as far from one another."""
    return getattr(device, "slice_index", 0) or 0 if device.platform == "tpu" else 0


def _live(sizes: Mapping[str, int]) -> dict[str, int]:
    """The axes of more than one device, in their order; one of a single device where there are none."""
    return {name: sizes[name] for name in MESH_AXES if sizes.get(name, 1) > 1} or {"data": 1}


def torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """Sizes of the dimensions that the devices fill, largest first; (their number,) where they have no coordinates or
    leave gaps."""
    coordinates = [(*getattr(d, "coords", ()), getattr(d, "core_on_chip", 0)) for d in devices]
    spans = tuple(len(set(values)) for values in zip(*coordinates, strict=True))
    if math.prod(spans) != len(devices):
        spans = (len(devices),)
    return tuple(sorted((n for n in spans if n > 1), reverse=True)) or (1,)


def spread(size: int, dimensions: Sequence[int]) -> tuple[int, ...]:
    """`size` as factors, each of which divides a dimension of its own: whole dimensions before parts of them, few
    factors before many; (size,) when that cannot be."""
    found = []
    for count in range(1, min(len(dimensions), len(FSDP)) + 1):
        for chosen in itertools.combinations(dimensions, count):
            options = itertools.product(*([f for f in range(2, n + 1) if n % f == 0] for n in chosen))
            found += [(sum(f != n for f, n in zip(factors, chosen, strict=True)), count, factors)
                      for factors in options if math.prod(factors) == size]
    return min(found)[2] if found else (size,)


def _known(mesh: Mesh) -> Mesh:
    for name in mesh.axis_names:
        if name not in MESH_AXES:
            raise UserError(f"mesh axis '{name}' in '{dict(mesh.shape)}' is not supported: {', '.join(MESH_AXES)} are")
    live = _live(mesh.shape)
    if tuple(live) == mesh.axis_names:
        return mesh
    order = [mesh.axis_names.index(name) for name in MESH_AXES if name in mesh.axis_names]
    return Mesh(np.transpose(mesh.devices, order).reshape(tuple(live.values())), tuple(live),
                axis_types=(AxisType.Auto,) * len(live))


def per_device(fn: Callable, mesh: Mesh | None, in_specs, out_specs) -> Callable:
    """`fn(*local_arrays, ax=Axes)` over global arrays: mapped over the mesh, or called directly when there is none.

    Specs may name any of MESH_AXES; those that the mesh has not got are left out. Take gradients *outside* of it: the
    variance check then types every collective, and the gradient of a replicated parameter is the sum over the devices
    that used it.
    """
    ax = Axes.of(mesh)

    def local(*args):
        return fn(*args, ax=ax)

    if mesh is None:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=on_mesh(in_specs, mesh), out_specs=on_mesh(out_specs, mesh),
                         check_vma=True)


def on_mesh(specs, mesh: Mesh):
    """Partition specs, or a tree of them, without the axes that the mesh has not got."""
    def known(spec: P) -> P:
        return P(*(_known_axes(entry, mesh) for entry in spec))

    return jax.tree.map(known, specs, is_leaf=lambda x: isinstance(x, P))


def _known_axes(entry: Any, mesh: Mesh) -> tuple[str, ...] | None:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(n for n in names if n in mesh.axis_names) or None


def shardings(specs, mesh: Mesh):
    """Partition specs, or a tree of them, as shardings on the mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), on_mesh(specs, mesh), is_leaf=lambda x: isinstance(x, P))


def place(tree, mesh: Mesh | None, spec: Any = REPLICATED):
    """Put host arrays on the mesh (or the default device) under one partition spec, or a tree of them."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    return jax.device_put(tree, shardings(spec, mesh))
