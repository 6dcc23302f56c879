"""Which devices a collective joins: XLA's ways of writing groups, and the axes and dimensions they lie along.

Numbers in a group are places in the flattened mesh, not the devices' own ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qwen2_jax.plan.hlo import HloError, Instruction

Groups = list[tuple[int, ...]]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=(mesh\[[^{]*\{[^}]*\})")
_ORDERED = re.compile(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)")
_LISTED = re.compile(r"device_ids=\(([\d,]+)\)")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_AXIS_REF = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """Of a collective: the devices that exchange; of a permute, its (source, target) pairs.

    All `devices` are one group where the instruction names none. Raises HloError for a form that is not known.
    """
    if found := _MESH_GROUPS.search(instruction.attributes):    # with a comma outside of its brackets
        return parse_groups(found[1], devices)
    pairs = instruction.attribute("source_target_pairs")
    return parse_groups(pairs or instruction.attribute("replica_groups"), devices)


def parse_groups(text: str, devices: int) -> Groups:
    """`{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`, `mesh['a'=2,'b'=2] {'b'}`, or the last with an order of
    devices, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`."""
    if text in ("", "{}"):
        return [tuple(range(devices))]
    if text.startswith("{"):
        return [_ints(inner) for inner in re.findall(r"\{([\d,]*)\}", text[1:-1])] or [_ints(text[1:-1])]
    if found := _IOTA.fullmatch(text):
        return [tuple(row) for row in _iota(found[2], found[3]).reshape(_ints(found[1])).tolist()]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    raise HloError(f"groups of devices written '{text[:80]}' are not known")


def _mesh_groups(text: str) -> Groups:
    """Axes of a named mesh, or parts of them: `'a':(2)4` is the axis that is left of `a` when 2 have been split off it
    to the left and 4 are taken."""
    mesh, _, chosen = text.rpartition("{")
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
    grid = np.arange(math.prod(sizes.values()))
    if "device_ids" in mesh:
        if found := _ORDERED.search(mesh):
            grid = _iota(found[1], found[2])
        elif found := _LISTED.search(mesh):
            grid = np.array(_ints(found[1]))
        else:
            raise HloError(f"groups of devices written '{text[:80]}' are not known")
    refs = {name: (int(before or 1), int(size or sizes[name]))
            for name, before, size in _AXIS_REF.findall(chosen.rstrip("}"))}
    shape, kept, joined = [], [], []
    for name, size in sizes.items():
        before, taken = refs.get(name, (size, 1))
        for part, is_joined in ((before, False), (taken, True), (size // before // taken, False)):
            (joined if is_joined else kept).append(len(shape))
            shape.append(part)
    rows = grid.reshape(shape).transpose(*kept, *joined)
    return [tuple(row) for row in rows.reshape(-1, math.prod(shape[i] for i in joined)).tolist()]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _ints(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose(_ints(permutation)).reshape(-1) if permutation else grid.reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def varying(groups: Groups, grid: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Columns of `grid`, a row of coordinates for each device, in which some group's members differ."""
    coordinates = np.asarray(grid)
    found: set[int] = set()
    for group in groups:
        rows = coordinates[list(group)]
        found |= set(np.flatnonzero((rows != rows[:1]).any(axis=0)).tolist())
    return tuple(sorted(found))


def mesh_coordinates(shape: Iterable[int]) -> list[tuple[int, ...]]:
    """Of each place in a flattened mesh of that shape."""
    sizes = tuple(shape)
    return [tuple(int(i) for i in np.unravel_index(n, sizes)) for n in range(math.prod(sizes))]


def torus_coordinates(devices: Iterable[Any]) -> list[tuple[int, ...]]:
    """(x, y, z, core) of each device; a single number where it has no place on a torus."""
    found = [(*device.coords, device.core_on_chip) if getattr(device, "coords", None) is not None else (device.id,)
             for device in devices]
    return [tuple(map(int, place)) for place in found]
