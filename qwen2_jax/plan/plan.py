"""One plan: a task on a mesh of a topology, compiled, read and priced."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax import __version__
from qwen2_jax.errors import UserError
from qwen2_jax.plan.compiled import Buffer, Compiled, OutOfMemory, compile_for_tpu, no_cache
from qwen2_jax.plan.costs import Costs, Spent, spent
from qwen2_jax.plan.flops import model_flops
from qwen2_jax.plan.hlo import Program, Trips, parse
from qwen2_jax.plan.ledger import Collective, Ledger
from qwen2_jax.plan.links import Torus
from qwen2_jax.plan.program import Lowered, Task, lower, mesh_of
from qwen2_jax.plan.topology import Topology, libtpu_version, tpu_devices
from qwen2_jax.sharding.axes import FSDP
from qwen2_jax.sharding.compiler import serving_options

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `--json` prints, and what only people read. Bytes and seconds of one device; None where the program does not
    fit, so that there is nothing to read them from."""

    model: str
    topology: Topology
    mesh: str
    task: Task
    mesh_devices: int
    argument_bytes: int
    temp_bytes: int | None
    peak_bytes: int
    """Where the program was not compiled, of its arguments alone."""
    fits: bool
    compiled: bool = True
    """False: not even its arguments fit, which was answer enough."""
    collectives: list[Collective] | None = None
    spent: Spent | None = None
    exposed_seconds: float | None = None
    compile_seconds: float | None = None
    buffers: list[Buffer] = field(default_factory=list)
    """The largest, where the program does not fit: as the compiler says, or of its arguments, where it says nothing."""
    text: str = ""

    @property
    def model_flops_per_device(self) -> float:
        return model_flops(self.task.cfg, self.task.mode, self.task.batch, self.task.seq) / self.mesh_devices

    @property
    def predicted_seconds(self) -> float | None:
        if self.spent is None or self.exposed_seconds is None:
            return None
        return self.spent.fusions + self.spent.kernels + self.exposed_seconds

    @property
    def predicted_mfu(self) -> float | None:
        seconds = self.predicted_seconds
        return None if not seconds else self.model_flops_per_device / seconds / self.topology.chip.flops

    @property
    def bandwidth_share(self) -> float | None:
        """Of decoding: the time in which HBM hands over weights and cache once, to the time predicted."""
        seconds = self.predicted_seconds
        if self.task.mode != "decode" or not seconds:
            return None
        return self.argument_bytes / self.topology.chip.hbm_bandwidth / seconds

    def plain(self) -> dict[str, Any]:
        """The object of `--json`."""
        found = self.spent
        return {
            "model": self.model, "topology": str(self.topology), "chips": self.topology.chips,
            "devices": self.topology.devices, "mesh": self.mesh, "mode": self.task.mode, "seq": self.task.seq,
            "batch": self.task.batch, "argument_bytes": self.argument_bytes, "temp_bytes": self.temp_bytes,
            "peak_bytes": self.peak_bytes, "hbm_bytes": self.topology.chip.hbm_bytes, "fits": self.fits,
            "compiled": self.compiled,
            "collectives": None if self.collectives is None else [row.plain() for row in self.collectives],
            "model_flops_per_device": self.model_flops_per_device,
            "fusion_seconds": found and found.fusions, "kernel_seconds": found and found.kernels,
            "exposed_collective_seconds": self.exposed_seconds, "predicted_seconds": self.predicted_seconds,
            "predicted_mfu": self.predicted_mfu, "compile_seconds": self.compile_seconds, "versions": versions(),
        }


def versions() -> dict[str, str | None]:
    return {"qwen2_jax": __version__, "jax": jax.__version__,
            "libtpu": libtpu_version(), "python": platform.python_version()}


def make_plan(model: str, task: Task, topology: Topology, mesh_spec: str, *, say: Say) -> Plan:
    """Compile the task's program for a mesh of a topology and read it. `say` gets a line before each long wait.

    Raises UserError: the topology, the mesh or the task do not fit each other; UnknownKernel, HloError: the program
    holds something that has no price here.
    """
    devices = tpu_devices(topology)
    try:
        mesh = mesh_of(mesh_spec, devices)
    except UserError as error:      # told of this program's devices, which these are not
        raise UserError(str(error).replace("this machine has", f"{topology} has")) from None
    say(f"tracing {model} for {topology}, mesh {mesh_text(mesh)}")
    with no_cache():
        program = lower(task, mesh)
        # What must lie there before the first instruction settles the matter; compiling it might take many minutes.
        handed = sum(buffer.bytes for buffer in program.arguments)
        if compiled := handed <= topology.chip.hbm_bytes:
            say("compiling, which takes from seconds to minutes")
            found = compile_for_tpu(program.lowered, {} if task.mode == "train" else serving_options(mesh))
        else:
            found = OutOfMemory(handed, topology.chip.hbm_bytes)
    common: dict[str, Any] = {"model": model, "topology": topology, "mesh": mesh_text(mesh), "task": task,
                              "mesh_devices": mesh.size}
    if isinstance(found, OutOfMemory):
        return Plan(**common, argument_bytes=handed, temp_bytes=None, peak_bytes=found.used_bytes, fits=False,
                    compiled=compiled, buffers=found.buffers or program.arguments)
    collectives, work = read(parse(found.text), topology, dict(mesh.shape), list(mesh.devices.flat), devices,
                             program.assumed, program.repeats)
    exposed = sum(row.exposed_seconds for row in collectives)
    return Plan(**common, argument_bytes=found.argument_bytes, temp_bytes=found.temp_bytes, peak_bytes=found.peak_bytes,
                fits=found.peak_bytes <= topology.chip.hbm_bytes, collectives=collectives, spent=work,
                exposed_seconds=exposed, compile_seconds=found.seconds, text=_annotated(found, program))


def read(text: Program, topology: Topology, mesh_shape: Mapping[str, int], mesh_devices: Sequence[Any],
         devices: Sequence[Any], assumed: Trips = lambda loop: None,
         repeats: int = 1) -> tuple[list[Collective], Spent]:
    """(collectives, computing) of a compiled program in one step, in which it runs `repeats` times. The mesh's devices
    in order are of the topology's `devices`."""
    costs = Costs(text, topology.chip)
    torus = Torus.of(topology.chip, mesh_devices, devices)
    ledger = Ledger(text, costs, torus, mesh_shape, assumed, repeats)
    return ledger.collectives(), spent(costs, assumed, repeats)


def mesh_text(mesh: Mesh) -> str:
    """A mesh as it is written: "fsdp=4x4,tensor=2"."""
    sizes = dict(mesh.shape)
    fsdp = "x".join(str(sizes[name]) for name in FSDP if name in sizes)
    rest = [f"{name}={size}" for name, size in sizes.items() if name not in FSDP]
    return ",".join([*rest[:"data" in sizes], *([f"fsdp={fsdp}"] if fsdp else []), *rest["data" in sizes:]])


def _annotated(found: Compiled, program: Lowered) -> str:
    """The compiled text, headed by what it leaves open."""
    lines = [f"// Loops with computed bounds in scopes like '{pattern}' are taken to turn {turns:g} times."
             for pattern, turns in program.loops.items()]
    if program.repeats > 1:
        lines.append(f"// The program runs {program.repeats} times a step.")
    return "\n".join([*lines, found.text])
