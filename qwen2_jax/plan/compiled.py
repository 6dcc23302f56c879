"""Compiling for a topology: the program's memory and text, or why it does not fit."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from qwen2_jax.errors import UserError

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}

SIZE = rf"[\d.]+[{''.join(UNITS)}]?"
"""Of memory, as the compiler writes it."""
ALL_DEVICES = "device assignment should include all slice devices"


@dataclass(frozen=True)
class Buffer:
    """An allocation on one device, and what it is for."""

    bytes: int
    shape: str
    scope: str


@dataclass(frozen=True)
class OutOfMemory:
    """What the compiler says of it, in bytes of one device."""

    used_bytes: int
    hbm_bytes: int
    buffers: list[Buffer] = field(default_factory=list)


@dataclass(frozen=True)
class Compiled:
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    text: str
    seconds: float
    """That compiling took."""


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """No persistent cache: without a TPU a program for one cannot be read back from it. JAX decides once a process
    whether it uses one, hence the resets."""
    before = jax.config.jax_enable_compilation_cache        # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_for_tpu(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> Compiled | OutOfMemory:
    """Compiles a program lowered for a TPU, with options beside its own. That it needs too much of a device's memory is
    an answer; UserError: too much of another memory, or a mesh of fewer devices than the slice must be used with. Any
    other failure is raised."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options))
    except Exception as error:      # the type depends on the plug-in
        found = out_of_memory(str(error))
        if found is not None:
            return found
        if other := re.search(rf"memory space (\w+)\. Used ({SIZE}) of ({SIZE}) ", str(error)):
            raise UserError(f"the program does not compile: it needs {other[2]} of the memory space {other[1]}, which "
                            f"has {other[3]}; take another --batch, --seq or --mesh") from error
        if ALL_DEVICES in str(error):       # v5e:8x8 and larger
            raise UserError("the program does not compile: on this slice it must run on all devices; take a --mesh of "
                            "all of them, or a smaller --topology") from error
        raise
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes,
                    _text(lowered, compiled, options), seconds)


def _text(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled, options: Mapping[str, Any]) -> str:
    """The optimised program. Some versions of libtpu make programs that JAX cannot print; XLA's dump can."""
    try:
        text = compiled.as_text()
    except Exception:
        text = None
    if text:
        return text
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (dumped,) = Path(folder).glob("*jit*after_optimizations.txt")
        return dumped.read_text(encoding="utf-8")


def out_of_memory(message: str) -> OutOfMemory | None:
    """What the compiler's message says; None where it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(rf"Used ({SIZE}) of ({SIZE}) hbm", message) or re.search(
        rf"temporaries \(({SIZE})\) exceeds available HBM \(({SIZE})\)", message)
    if found is None:
        return None
    buffers = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", part)
        scope = re.search(r'op_name="([^"]*)"', part)
        size = re.match(SIZE, part)
        if size:
            buffers.append(Buffer(_bytes(size[0]), shape[1] if shape else "", scope[1] if scope else ""))
    return OutOfMemory(_bytes(found[1]), _bytes(found[2]), buffers)


def _bytes(text: str) -> int:
    """`15.75G` in bytes."""
    number = text.rstrip("".join(UNITS))
    return round(float(number) * UNITS[text[len(number):]])
