"""Every collective of a compiled step: what it moves, over which axes, how long, and how much of that nothing covers.

Three things in libtpu's text mislead. A reduce-scatter is often an all-reduce inside of a fusion named
`all-reduce-scatter`. A collective that is fused with computation (`async_collective_fusion`) stands in the fusion that
starts it, in each that carries it on, and in the one that ends it, under one channel: its start counts. And a
collective may be carried on by the fusions of an inner loop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2_jax.plan.costs import Costs
from qwen2_jax.plan.groups import groups_of, mesh_coordinates, varying
from qwen2_jax.plan.hlo import Computation, Instruction, Program, Trips
from qwen2_jax.plan.links import DIMENSIONS, Torus, wire_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
WRAPPERS = ("async-start", "call-start")
"""Starts of computations that run beside; on tpu7x collectives are given to the sparse cores so."""
Key = str


@dataclass(frozen=True)
class Found:
    """One collective as it is written."""

    kind: str
    axes: tuple[str, ...]
    """Dimensions of the torus."""
    mesh_axes: tuple[str, ...]
    bytes: float
    """Full buffers: what a gather ends with, what a scatter or a sum starts with."""
    wire_bytes: float
    seconds: float


@dataclass(frozen=True)
class Collective(Found):
    """All collectives of one kind over the same axes, added up: a device and a step."""

    count: int
    exposed_seconds: float

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "axes": list(self.axes), "mesh_axes": list(self.mesh_axes), "count": self.count,
                "bytes": self.bytes, "wire_bytes": self.wire_bytes, "seconds": self.seconds,
                "exposed_seconds": self.exposed_seconds}


@dataclass
class Flight:
    """A collective between its start and its end."""

    found: Found
    left: float
    """Seconds that nothing has covered yet."""
    fused: bool
    """Carried on by fusions of its own alone, not by whatever runs meanwhile."""


@dataclass
class Covering:
    """What one run of a computation offers to collectives in flight: all of its computing, and what carries on each
    fused collective."""

    seconds: float = 0.0
    steps: defaultdict[Key, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Covering, times: float = 1.0) -> None:
        self.seconds += times * other.seconds
        for key, seconds in other.steps.items():
            self.steps[key] += times * seconds


@dataclass
class Ledger:
    """Walks a program in scheduled order; `collectives()` is what it found."""

    program: Program
    costs: Costs
    torus: Torus
    mesh_shape: Mapping[str, int]
    assumed: Trips
    repeats: int = 1

    def __post_init__(self):
        self._mesh_grid = mesh_coordinates(self.mesh_shape.values())
        self._totals: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[float]] = {}
        self._walk(self.program.entry, float(self.repeats))

    def collectives(self) -> list[Collective]:
        """Longest first."""
        rows = [Collective(*key, round(size), round(wire), seconds, count=round(count), exposed_seconds=exposed)
                for key, (count, size, wire, seconds, exposed) in self._totals.items()]
        return sorted(rows, key=lambda row: (-row.seconds, row.kind, row.mesh_axes))

    def _add(self, found: Found, times: float) -> None:
        total = self._total(found)
        for i, value in enumerate((1, found.bytes, found.wire_bytes, found.seconds)):
            total[i] += times * value

    def _expose(self, found: Found, seconds: float) -> None:
        self._total(found)[4] += seconds

    def _total(self, found: Found) -> list[float]:
        return self._totals.setdefault((found.kind, found.axes, found.mesh_axes), [0.0] * 5)

    def _walk(self, name: str, times: float) -> Covering:
        computation = self.program.computations[name]
        flying: dict[Key, Flight] = {}
        offered = Covering()
        for instruction in computation.values():
            covering = Covering()
            for event, key, where, at in self._events(instruction, computation):
                if event == "step":
                    covering.steps[key] += self.costs.seconds(instruction, name)
                elif event == "end":
                    if key in flying:
                        flight = flying.pop(key)
                        self._expose(flight.found, times * flight.left)
                elif (found := self._found(where, at)) is not None:
                    self._add(found, times)
                    if event == "whole":
                        self._expose(found, times * found.seconds)
                    else:
                        flying[key] = Flight(found, found.seconds, event == "fused start")
            covering.seconds += self.costs.seconds(instruction, name)
            if not _wrapped(instruction, self.program):
                for inner, count in self.program.inner(instruction, name, self.assumed):
                    covering.add(self._walk(inner, times * count), count)
            _cover(flying, covering)
            offered.add(covering)
        for flight in flying.values():      # carried out of the computation: what is left is not known to be covered
            self._expose(flight.found, times * flight.left)
        return offered

    def _events(self, instruction: Instruction, computation: Computation) -> Iterator[
            tuple[str, Key, Instruction, Computation]]:
        """(what happens, key of the collective, the collective, the computation it is written in)."""
        opcode = instruction.opcode
        if opcode in KINDS:
            yield "whole", "", instruction, computation
        elif opcode.endswith("-start") and opcode.removesuffix("-start") in KINDS:
            yield "start", instruction.name, instruction, computation
        elif opcode in WRAPPERS:
            for inner, at in _inside(instruction, self.program):
                yield "start", instruction.name, inner, at
        elif opcode.endswith("-done") and instruction.operands:
            yield "end", _first(instruction.operands[0], computation), instruction, computation
        elif opcode == "fusion":
            for inner, at in _inside(instruction, self.program):
                yield _role(instruction, at), _channel(inner), inner, at

    def _found(self, instruction: Instruction, computation: Computation) -> Found | None:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and _scatters(instruction, computation):
            kind = "reduce-scatter"
        groups = groups_of(instruction, len(self._mesh_grid))
        members = max(map(len, groups), default=1)
        if members < 2:
            return None
        size = self._full_bytes(instruction, computation, kind, members)
        axes = tuple(DIMENSIONS[i] for i in self.torus.axes(groups))
        names = list(self.mesh_shape)
        mesh_axes = tuple(names[i] for i in varying(groups, self._mesh_grid))
        return Found(kind, axes, mesh_axes, size, wire_bytes(kind, size, members),
                     self.torus.seconds(kind, size, groups))

    @staticmethod
    def _full_bytes(instruction: Instruction, computation: Computation, kind: str, members: int) -> float:
        operands = [computation[name].bytes for name in instruction.operands if name in computation]
        if kind == "ragged-all-to-all":
            return operands[0]      # then come the buffer that receives, and where each piece goes
        if kind == "collective-permute":
            return operands[0] if "-start" in instruction.opcode else sum(operands)
        return sum(operands) * (members if kind == "all-gather" else 1)


def _cover(flying: Mapping[Key, Flight], covering: Covering) -> None:
    """Lets the flights use the time that was computed meanwhile, the earlier first: a link carries one at a time."""
    room: dict[str, float] = {}
    for key, flight in flying.items():
        offered = covering.steps[key] if flight.fused else covering.seconds
        axes = flight.found.axes or ("",)
        used = min(flight.left, offered, *(room.get(axis, covering.seconds) for axis in axes))
        flight.left -= used
        for axis in axes:
            room[axis] = room.get(axis, covering.seconds) - used


def _inside(instruction: Instruction, program: Program) -> Iterator[tuple[Instruction, Computation]]:
    """The collectives in the computations that an instruction calls, with the computation that each stands in."""
    for key in ("calls", "to_apply", "called_computations"):
        for name in instruction.called.get(key, ()):
            computation = program.computations[name]
            for inner in computation.values():
                if inner.opcode.removesuffix("-start") in KINDS:
                    yield inner, computation
                elif inner.opcode in ("fusion", "call"):
                    yield from _inside(inner, program)


def _wrapped(instruction: Instruction, program: Program) -> bool:
    """Whether this starts a collective that stands in a computation of its own, which is no schedule."""
    return instruction.opcode in WRAPPERS and next(_inside(instruction, program), None) is not None


def _role(fusion: Instruction, computation: Computation) -> str:
    """What a fusion around a collective does with it."""
    inside = " ".join(instruction.attributes for instruction in computation.values())
    if '"AsyncCollectiveStart"' in inside:
        return "fused start"
    if '"AsyncCollectiveDone"' in inside:
        return "end"
    carried = '"async_collective_fusion_config"' in inside or fusion.called["calls"][0].startswith("async_collective_")
    return "step" if carried else "whole"


def _channel(collective: Instruction) -> Key:
    """What start, steps and end of a fused collective have in common."""
    return " ".join((collective.opcode, collective.attribute("channel_id"), collective.attribute("replica_groups"),
                     collective.attribute("source_target_pairs"), collective.attribute("frontend_attributes")))


def _scatters(all_reduce: Instruction, computation: Computation) -> bool:
    """Whether all that is kept of a sum is this device's slice of it."""
    users = [i for i in computation.values() if all_reduce.name in i.operands]
    return bool(users) and all(i.opcode == "dynamic-slice" for i in users)


def _first(name: str, computation: Computation) -> str:
    """The start behind an end, through updates in between."""
    for _ in range(len(computation)):
        found = computation.get(name)
        if found is None or not found.opcode.endswith("-update") or not found.operands:
            break
        name = found.operands[0]
    return name


