"""Where a collective travels on the torus of chips, and how long the links take for it.

A ring of n devices gathers or scatters a buffer by sending (n-1)/n of it over each link; with links both ways each
carries half. Devices in a line have no way back: the link at its end carries all. Groups that take every s-th chip
share their links with s-1 others. Over several dimensions the links of all of them are used at once ("How to Scale Your
Model", chapter "Sharded matrices").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_jax.plan.chips import Chip
from qwen2_jax.plan.groups import Groups, torus_coordinates, varying

DIMENSIONS = ("x", "y", "z", "core")
CORE = 3
WIRE = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1,
        "collective-broadcast": 1}
"""Times (n-1)/n of the full buffer that a device sends."""


@dataclass(frozen=True)
class Torus:
    """The chips under a mesh."""

    chip: Chip
    places: tuple[tuple[int, ...], ...]
    """(x, y, z, core) of each device, in the order of the flattened mesh."""
    dimensions: tuple[int, ...]
    """Chips along x, y and z in the whole slice, used by the mesh or not."""

    @classmethod
    def of(cls, chip: Chip, mesh_devices: Sequence[Any], slice_devices: Sequence[Any]) -> Torus:
        everywhere = torus_coordinates(slice_devices)
        sizes = tuple(len({place[i] for place in everywhere}) for i in range(CORE))
        return cls(chip, tuple(torus_coordinates(mesh_devices)), sizes)

    def axes(self, groups: Groups) -> tuple[int, ...]:
        """The dimensions along which members of a group differ."""
        return varying(groups, self.places)

    def seconds(self, kind: str, size: float, groups: Groups) -> float:
        """Time of one collective over a full buffer of `size` bytes a device; the slowest group decides."""
        if kind == "collective-permute":
            return size * self._fullest(groups)
        return max((self._group_seconds(kind, size, group) for group in groups), default=0.0)

    def _group_seconds(self, kind: str, size: float, group: tuple[int, ...]) -> float:
        n = len(group)
        dimensions = self.axes([group])
        if n < 2 or not dimensions:
            return 0.0
        rates = {d: self._rate(d, group) for d in dimensions}
        if "all-to-all" in kind:
            # Half of the devices send half of what they have across the middle of the longest dimension.
            return max(size * self._members(d, group) / 4 / rate for d, rate in rates.items())
        # A diagonal of a box goes round corners, on links that other diagonals use as well.
        filled = n / math.prod(self._members(d, group) for d in dimensions)
        return wire_bytes(kind, size, n) / (sum(rates.values()) * filled)

    def _members(self, dimension: int, group: tuple[int, ...]) -> int:
        return len({self.places[i][dimension] for i in group})

    def _rate(self, dimension: int, group: tuple[int, ...]) -> float:
        """Bytes a second that a device passes on along one dimension, both ways together where it is a ring."""
        if dimension == CORE:
            return self.chip.core_bandwidth
        at = sorted({self.places[i][dimension] for i in group})
        stride = (at[-1] - at[0]) / (len(at) - 1)
        whole = self.dimensions[dimension]
        ring = len(at) * stride == whole and self.chip.wraps(whole, self._sizes)
        return (2 if ring else 1) * self._link / stride

    @property
    def _link(self) -> float:
        return self.chip.link_bandwidth / self.chip.devices_per_chip

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.dimensions[:self.chip.dimensions]

    def _fullest(self, pairs: Groups) -> float:
        """Seconds a byte of the link that most of the transfers between pairs (from, to) share: each goes along one
        dimension after the other, the short way round."""
        load: Counter[tuple] = Counter()
        for source, target in pairs:
            at, to = list(self.places[source]), self.places[target]
            for d, end in enumerate(to):
                for _ in range(abs(steps := self._steps(d, at[d], end))):
                    load[d, steps > 0, *at] += 1
                    at[d] = (at[d] + (1 if steps > 0 else -1)) % self._length(d)
        return max((count / (self.chip.core_bandwidth if d == CORE else self._link)
                    for (d, *_), count in load.items()), default=0.0)

    def _steps(self, dimension: int, start: int, end: int) -> int:
        """Links from one place to another, negative downwards."""
        length, steps = self._length(dimension), end - start
        if dimension != CORE and self.chip.wraps(length, self._sizes) and abs(steps) > length / 2:
            steps -= math.copysign(length, steps)
        return int(steps)

    def _length(self, dimension: int) -> int:
        return self.chip.devices_per_chip if dimension == CORE else self.dimensions[dimension]


def wire_bytes(kind: str, size: float, n: int) -> float:
    """Bytes that each of n devices sends for a full buffer of `size` bytes: on a ring, or straight to one other."""
    return size if kind == "collective-permute" else WIRE[kind] * size * (n - 1) / n
