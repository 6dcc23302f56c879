"""How long a device computes: the compiler's cycles of each fusion, and bounds for kernels that it does not look into.

libtpu writes `estimated_cycles` beside each instruction that it schedules by itself, for arithmetic and HBM together,
collectives and custom calls left out. What it moves between memories in the background (`copy-start`, `slice-start`)
has none, and is taken to be hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwen2_jax.plan.chips import KERNEL_EFFICIENCY, Chip
from qwen2_jax.plan.hlo import Computation, Instruction, Program, Trips

UNKNOWN_CYCLES = 2**63 - 1
FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesAligned",
    "GatherScatterIndicesBitpacked", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint",
    "X64Combine", "X64SplitHigh", "X64SplitLow", "annotate_device_placement", "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
}
"""Custom calls that are names for memory or promises to the compiler, and no work."""


class UnknownKernel(ValueError):
    """A custom call that no entry of KERNELS prices; the message names it."""


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / (KERNEL_EFFICIENCY * chip.flops), self.bytes / chip.hbm_bandwidth)


Array = tuple[str, tuple[int, ...]]
"""dtype and dimensions."""
Flops = Callable[[list[Array]], float]
"""Arithmetic of a kernel, from its operands."""


def _splash(products: int) -> Flops:
    """Causal attention of q [..., N, T, H] over k [..., K, S, H]: `products` matrix products of T x S x H a head, half
    of each masked away."""
    def flops(operands: list[Array]) -> float:
        (*rows, T, H), (*_, S, _) = _floating(operands)
        return products * 2 * math.prod(rows) * T * S * H / 2

    return flops


def _grouped(operands: list[Array]) -> float:
    """Rows [C, D], each times the matrix of its group [E, …], D of it summed: as if every row were of a group."""
    (rows, _), (_, *matrix) = _floating(operands)
    return 2 * rows * math.prod(matrix)


def _grouped_gradient(operands: list[Array]) -> float:
    """The gradient of each group's matrix, from rows [C, O] and [C, D]; one of them may lie transposed."""
    first, second = _floating(operands)
    rows = next(n for n in first if n in second)
    return 2 * math.prod(first) * math.prod(second) / rows


def _floating(operands: list[Array]) -> list[tuple[int, ...]]:
    """The first two arrays of real numbers: tables of blocks and groups come first and are of whole ones."""
    return [dims for dtype, dims in operands if dtype in ("bf16", "f32")][:2]


KERNELS: Mapping[str, Flops] = {
    r"splash_m[hq]a_fwd": _splash(2),              # scores; their product with the values
    r"splash_m[hq]a_dq": _splash(3),               # scores, the gradient of scores, that of queries
    r"splash_m[hq]a_dkv": _splash(4),              # scores and their gradient, those of keys and of values
    r"jit\(gmm\)": _grouped,
    r"jit\(tgmm\)": _grouped_gradient,
}
"""Kernel's name → its arithmetic. The names are those of jax.experimental.pallas.ops.tpu."""
FUSED_BACKWARD = _splash(5)
"""`splash_*_dkv` that returns the gradient of queries as well: more results than
two gradients and two scratch buffers."""
FUSED_RESULTS = 4


@dataclass(frozen=True)
class Costs:
    """Seconds of single instructions on one chip."""

    program: Program
    chip: Chip

    def cycles(self, instruction: Instruction) -> int | None:
        """The compiler's estimate; None where it has none, or says that it does not know."""
        if "estimated_cycles" not in instruction.attributes:
            return None
        found = instruction.backend.get("window_config", {}).get("estimated_cycles")
        return None if found is None or int(found) == UNKNOWN_CYCLES else int(found)

    def fusion(self, instruction: Instruction) -> float:
        return 0.0 if instruction.opcode == "custom-call" else (self.cycles(instruction) or 0) / self.chip.clock

    def kernel(self, instruction: Instruction, computation: str) -> float:
        """Of a custom call; 0 for any other instruction. Raises UnknownKernel."""
        if instruction.opcode != "custom-call":
            return 0.0
        target = call_target(instruction)
        if target in FREE_CALLS:
            return 0.0
        return kernel_work(instruction, self.program.computations[computation], target).seconds(self.chip)

    def seconds(self, instruction: Instruction, computation: str) -> float:
        return self.fusion(instruction) + self.kernel(instruction, computation)


def call_target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def kernel_work(call: Instruction, computation: Computation, target: str) -> Work:
    """Arithmetic and memory traffic of a kernel: each operand read and each result written once."""
    operands = [array for name in call.operands for array in computation[name].arrays]
    moved = sum(computation[name].bytes for name in call.operands) + call.bytes
    where = f"{call.name} {call.scope} {target}"
    for pattern, flops in KERNELS.items():
        if re.search(pattern, where):
            if "dkv" in pattern and len(call.arrays) > FUSED_RESULTS:
                flops = FUSED_BACKWARD
            return Work(flops(operands), moved)
    raise UnknownKernel(f"the custom call {call.name} (target '{target}', {call.scope or 'no scope'}) has no entry in "
                        "the table of kernel costs (qwen2_jax/plan/costs.py)")


@dataclass
class Spent:
    """What a step computes on one device, in seconds."""

    fusions: float = 0.0
    kernels: float = 0.0
    unknown: int = 0
    """Scheduled instructions whose cycles the compiler does not know: counted as nothing."""
    by_part: dict[tuple[str, str], float] | None = None
    """(part of the model, phase) → seconds, fusions and kernels together."""


def spent(costs: Costs, assumed: Trips, repeats: int = 1) -> Spent:
    """All that a step computes, in which the program runs `repeats` times."""
    total = Spent(by_part={})
    for run in costs.program.runs(assumed):
        instruction = run.instruction
        fusion = repeats * run.times * costs.fusion(instruction)
        kernel = repeats * run.times * costs.kernel(instruction, run.computation)
        total.fusions += fusion
        total.kernels += kernel
        total.unknown += "estimated_cycles" in instruction.attributes and costs.cycles(instruction) is None
        if fusion + kernel:
            key = part(instruction.scope), phase(instruction.scope)
            total.by_part[key] = total.by_part.get(key, 0.0) + fusion + kernel     # pyright: ignore
    return total


PARTS = ("attention", "moe", "mlp", "loss", "optimizer", "embed", "head", "sample", "norm")


def part(scope: str) -> str:
    """The part of the model that a scope such as "jit(step)/jvp()/Decoder/layers_0/attention/attn" lies in."""
    segments = re.findall(r"\w+", scope)
    return next((name for name in PARTS if name in segments), "other")


def phase(scope: str) -> str:
    if "rematted_computation" in scope:
        return "recomputed"
    if "optimizer" in scope:
        return "update"
    return "backward" if "transpose(" in scope else "forward"
