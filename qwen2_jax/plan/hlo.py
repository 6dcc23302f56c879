"""Reading a compiled program's text: computations, instructions, loops, and how often each instruction runs.

XLA prints one instruction a line, `%name = shape opcode(operands), attributes`. What a line means for time and memory
is said elsewhere; here is its grammar, and the trip counts of loops, which XLA for TPU leaves in their conditions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ITEMSIZE = {
    "pred": 1, "token": 0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4,
    "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e4m3": 1, "f8e3m4": 1, "f4e2m1fn": 0.5, "f8e8m0fnu": 1,
}
"""Bytes of one element."""
COPIES = ("copy", "bitcast", "convert", "copy-done", "optimization-barrier")
"""Opcodes that hand a loop's counter on as it is."""
CALLS = ("calls", "to_apply", "body", "condition", "branch_computations", "called_computations", "true_computation",
         "false_computation")
MOST_STEPS = 16
"""Instructions that a counter is followed through before it is given up."""

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([^\s=]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(" + "|".join(CALLS) + r")=(?:\{([^}]*)\}|%?([^\s,{}]+))")
_NAMES = re.compile(r"%([^\s,()]+)")


class HloError(ValueError):
    """The text is not what this grammar knows: another compiler's, or cut short."""


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    """Names; of a constant or a parameter, the text between the parentheses."""
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, dimensions) of the result: one, or those of a tuple in order."""
        return [(dtype, tuple(map(int, filter(None, dims.split(",")))))
                for dtype, dims in _ARRAY.findall(self.shape) if dtype in ITEMSIZE]

    @property
    def bytes(self) -> int:
        """Of the result, without the padding of its layout."""
        return sum(array_bytes(*array) for array in self.arrays)

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Attribute → computations that it names."""
        return {key: [name.strip().lstrip("%") for name in (many or one).split(",")]
                for key, many, one in _CALLED.findall(self.attributes)}

    @cached_property
    def backend(self) -> dict[str, Any]:
        """The backend's own configuration; {} where there is none, or none in JSON."""
        at = self.attributes.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes[at + len("backend_config="):])[0]
        except ValueError:
            return {}

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from, as in "jit(step)/jvp()/…/attention/…"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The text of `name=…` up to the next comma outside of brackets; "" when it is absent."""
        found = re.search(rf"(?:^|[\s,]){re.escape(name)}=", self.attributes)
        return _until_comma(self.attributes[found.end():]) if found else ""


def array_bytes(dtype: str, dims: tuple[int, ...]) -> int:
    return math.ceil(math.prod(dims) * ITEMSIZE[dtype])


@dataclass(frozen=True)
class Run:
    """An instruction that is scheduled by itself, not inside of a fusion, and how often a step runs it."""

    instruction: Instruction
    computation: str
    times: float


Computation = dict[str, Instruction]
Trips = Callable[[Instruction], float | None]
"""What a loop whose count the text does not tell is taken to run; None when that is not known either."""


@dataclass
class Program:
    """Computations by name, each in scheduled order."""

    computations: dict[str, Computation]
    entry: str

    def runs(self, assumed: Trips = lambda loop: None) -> Iterator[Run]:
        """All that is scheduled. Of a conditional both branches count: an upper bound.

        Raises HloError for a loop whose trip count neither the text nor `assumed` tells.
        """
        stack = [(self.entry, 1.0)]
        while stack:
            name, times = stack.pop()
            for instruction in self.computations[name].values():
                yield Run(instruction, name, times)
                stack += [(inner, times * n) for inner, n in self.inner(instruction, name, assumed)]

    def inner(self, instruction: Instruction, computation: str, assumed: Trips) -> list[tuple[str, float]]:
        """(computation, times) that an instruction runs as a schedule of its own."""
        called = instruction.called
        match instruction.opcode:
            case "while":
                count = self.trips(instruction, computation)
                if count is None:
                    count = assumed(instruction)
                if count is None:
                    raise HloError(f"the trip count of the loop {instruction.name} ({instruction.scope}) is not known")
                return [(called["body"][0], count)]
            case "call" | "async-start" | "call-start":
                return [(name, 1.0) for key in ("to_apply", "calls", "called_computations")
                        for name in called.get(key, ())]
            case "conditional":
                branches = called.get("branch_computations") or [*called["true_computation"],
                                                                 *called["false_computation"]]
                return [(name, 1.0) for name in branches]
        return []

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation].values() if i.root)

    def trips(self, loop: Instruction, computation: str) -> float | None:
        """How often a loop's body runs, where the text tells: XLA's own count, or a counter that starts and steps by
        constants up to a constant bound."""
        known = loop.backend.get("known_trip_count", {}).get("n")
        if known is not None:
            return float(known)
        condition, body = loop.called["condition"][0], loop.called["body"][0]
        compared = self._compared(condition)
        if compared is None:
            return None
        index, limit, direction = compared
        init = self.computations[computation].get(loop.operands[0])
        after = self.root(body)
        if init is None or init.opcode != "tuple" or after.opcode != "tuple":
            return None
        start = self.constant(computation, init.operands[index])
        step = self._step(body, after.operands[index], index)
        if start is None or not step:
            return None
        return _count(start, limit, step, direction)

    def constant(self, computation: str, name: str) -> int | None:
        """The integer that an instruction is, looking through copies; None where it is none."""
        found = self._source(computation, name)
        if found is None or found.opcode != "constant":
            return None
        return int(found.operands[0]) if re.fullmatch(r"-?\d+", found.operands[0]) else None

    def _source(self, computation: str, name: str) -> Instruction | None:
        """The instruction behind copies of it."""
        found = self.computations[computation].get(name)
        for _ in range(MOST_STEPS):
            if found is None or found.opcode not in COPIES or not found.operands:
                break
            at = found.operands[0]
            found = self.computations[computation].get(at)
            if found is not None and found.opcode == "copy-start":
                found = self.computations[computation].get(found.operands[0])
        return found

    def _compared(self, condition: str) -> tuple[int, int, str] | None:
        """(element of the loop's tuple, bound, direction) of a condition `counter < bound`, plain or in a fusion."""
        root = self.root(condition)
        where, sides = condition, root.operands
        if root.opcode == "fusion":
            where = root.called["calls"][0]
            inner = self.root(where)
            sides, root, outer = inner.operands, inner, root.operands
        else:
            outer = ()
        direction = root.attribute("direction")
        if root.opcode != "compare" or not direction:
            return None
        index = limit = None
        for side in sides:
            found, at = self._source(where, side), where
            if found is not None and found.opcode == "parameter" and where != condition:
                found, at = self._source(condition, outer[int(found.operands[0])]), condition
            if found is None:
                continue
            if found.opcode == "get-tuple-element":
                index = int(found.attribute("index"))
            elif (value := self.constant(at, found.name)) is not None:
                limit = value
        return None if index is None or limit is None else (index, limit, direction)

    def _step(self, body: str, name: str, index: int) -> int | None:
        """What one turn adds to the counter; None unless it is that counter plus or minus a constant."""
        found = self._source(body, name)
        if found is None:
            return None
        if found.opcode == "fusion":
            inner, outer = found.called["calls"][0], found.operands
            found = self.root(inner)
        else:
            inner, outer = body, ()
        if found.opcode not in ("add", "subtract") or len(found.operands) != 2:
            return None
        step, counted = None, False
        for operand in found.operands:
            source, at = self._source(inner, operand), inner
            if source is not None and source.opcode == "parameter" and inner != body:
                source, at = self._source(body, outer[int(source.operands[0])]), body
            if source is None:
                continue
            if source.opcode == "get-tuple-element":
                counted = int(source.attribute("index")) == index
            elif (value := self.constant(at, source.name)) is not None:
                step = value
        if step is None or not counted:
            return None
        return -step if found.opcode == "subtract" else step


def _count(start: int, limit: int, step: int, direction: str) -> float | None:
    """Turns until the bound is passed; a counter may go down, and stand on either side of the comparison."""
    match direction:
        case "LT" | "GT" | "NE":
            return float(max(0, math.ceil((limit - start) / step)))
        case "LE" | "GE":
            return float(max(0, math.floor((limit - start) / step) + 1))
    return None


def parse(text: str) -> Program:
    """The program of `Compiled.as_text()`, or of a dump of XLA's.

    Raises HloError: no entry computation was found.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""
    for line in [*text.splitlines(), "}"]:
        if current is None:
            if found := _HEADER.match(line):
                current, pending = computations.setdefault(found[2], {}), ""
                entry = found[2] if found[1] else entry
            continue
        ends = line == "}" or line.startswith("}, execution_thread=")
        if not ends and not _INSTRUCTION.match(line):
            pending += " " + line       # kernels' metadata go over several lines
            continue
        if pending:
            instruction = _instruction(pending)
            current[instruction.name] = instruction
        pending = line
        if ends:
            current = None
    if not entry:
        raise HloError("this is not the text of a compiled program: it has no entry computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None
    shape, opcode, operands, attributes = _split(found[3])
    literal = opcode in ("constant", "parameter")
    names = (operands,) if literal else tuple(_NAMES.findall(operands))
    return Instruction(found[2], shape, opcode, names, attributes, bool(found[1]))


def _split(text: str) -> tuple[str, str, str, str]:
    """shape, opcode, operands, attributes of what stands behind `=`."""
    end = _outside(text, 0, " ")
    shape, rest = text[:end], text[end + 1:]
    opens = rest.index("(")
    closes = _outside(rest, opens + 1, ")")
    return shape, rest[:opens], rest[opens + 1:closes], rest[closes + 1:].lstrip(", ")


def _outside(text: str, at: int, wanted: str) -> int:
    """Where `wanted` first stands outside of brackets, from `at` on; the text's length when it does not."""
    depth = 0
    for i in range(at, len(text)):
        c = text[i]
        if depth == 0 and c == wanted:
            return i
        depth += (c in "([{") - (c in ")]}")
    return len(text)


def _until_comma(text: str) -> str:
    return text[:_outside(text, 0, ",")].strip()
