"""docs/tpu_plans.md: which Qwen2 fits which TPU slice, and how fast it should be.   python -m tools.plan_table

One cell is a size, a slice and a mode. What arithmetic shows cannot fit is not compiled; the others are, in order,
Colab's slices and small models first, each kept as a JSON file in the folder `--cache`, so that a run that is stopped
goes on where it was. Cells whose turn has not come are written from the estimates, and say so.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_jax.cli.main import BUG
from qwen2_jax.cli.output import check_writable, whole_file
from qwen2_jax.errors import UserError
from qwen2_jax.plan.chips import CALIBRATED_LIBTPU, GIB
from qwen2_jax.plan.estimate import Estimate, candidates
from qwen2_jax.plan.program import Task
from qwen2_jax.plan.report import duration
from qwen2_jax.plan.topology import Topology, parse_topology, slices
from qwen2_jax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("Qwen2-0.5B", "Qwen2-1.5B", "Qwen2-7B", "Qwen2-57B-A14B", "Qwen2-72B")
COLAB = ("v2-8", "v5e-1", "v6e-1")
SLICES = (*COLAB, "v3-8", "v5e-8", "v5e-16", "v5p-8", "v6e-8", "v6e-16", "v5p-128", "tpu7x-8", "v5e-256", "v6e-256")
MODES = {
    "train 4k": ("train", 4096, None), "train 32k": ("train", 32768, None), "prefill": ("prefill", 4096, None),
    "decode": ("decode", 4096, None), "decode int8": ("decode", 4096, "int8"),
}
"""Column → (mode, tokens, quantization)."""
DECODE_ROWS = 8
"""Rows that decode together on each device."""
MOST = 1_000_000
"""Minutes or seconds that a command line may ask for."""
ERROR, THE_PROGRAM = "qwen2-jax: error: ", "qwen2-jax: error: the program "
"""How a user's error is told, and one that is of the program that was to be compiled."""
IMPOSSIBLE = 2.0
"""Times the memory there is: an estimate above it settles a cell without the compiler, as arguments alone do that are
more than there is."""


@dataclass(frozen=True)
class Cell:
    model: str
    slice: str
    column: str

    @property
    def topology(self) -> Topology:
        return parse_topology(self.slice)

    @property
    def task(self) -> Task:
        mode, seq, quant = MODES[self.column]
        rows = self.topology.devices * (DECODE_ROWS if mode == "decode" else 1)
        return Task(cfg=PRESETS[self.model], mode=mode, seq=seq, batch=rows, quant=quant)   # pyright: ignore

    @property
    def file(self) -> str:
        return "_".join((self.slice, self.model, self.column.replace(" ", "-"))) + ".json"

    def command(self, mesh: str) -> list[str]:
        task = self.task
        quant = ["--quant", task.quant] if task.quant else []
        return ["plan", self.model, "--topology", self.slice, "--mesh", mesh, "--mode", task.mode, "--seq",
                str(task.seq), "--batch", str(task.batch), *quant, "--json"]


def cells() -> Iterator[Cell]:
    """In the order in which they are compiled: by what a reader can rent for least."""
    for group in (COLAB, SLICES[len(COLAB):]):
        for model in MODELS:
            for column in reversed(MODES):      # what compiles fastest first
                for name in group:
                    yield Cell(model, name, column)


def estimates(cell: Cell) -> list[Estimate]:
    """Of the meshes that may fit, the fastest first; of none, where arithmetic shows that none does."""
    hbm = cell.topology.chip.hbm_bytes
    return [e for e in candidates(cell.task, cell.topology)
            if e.argument_bytes <= hbm and e.peak_bytes <= IMPOSSIBLE * hbm]


def chosen(cell: Cell) -> Estimate:
    """The fastest by estimate that fits by estimate; the fastest, where none does."""
    possible = estimates(cell)
    return next((e for e in possible if e.peak_bytes <= cell.topology.chip.hbm_bytes), possible[0])


def planned(command: list[str], seconds: float) -> dict[str, Any]:
    """What `qwen2-jax plan … --json` says, in a process of its own; {"failed": why} where the program does not compile.

    Raises:
      UserError: it is not the program that failed: libtpu is missing, memory or disk are full, somebody ended it.
      subprocess.TimeoutExpired: after `seconds`.
    """
    done = subprocess.run([sys.executable, "-m", "qwen2_jax", *command], capture_output=True, text=True,
                          timeout=seconds, check=False, cwd=ROOT)
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
    if done.returncode in (BUG, -signal.SIGABRT, -signal.SIGSEGV) or THE_PROGRAM in said:
        return {"failed": said}
    raise UserError(f"{' '.join(command[:4])}: {said.removeprefix(ERROR)}")


def compile_cell(cell: Cell, cache: Path, seconds: float) -> None:
    """The best mesh by estimate, compiled; the cache gets its plan, or why there is none. UserError as `planned`."""
    try:
        kept = planned(cell.command(str(chosen(cell).sizes)), seconds)
    except subprocess.TimeoutExpired:
        kept = {"failed": f"compiling took more than {seconds:.0f} seconds"}
    with whole_file(cache / cell.file) as file:
        json.dump(kept, file, indent=1)


def kept(cell: Cell, cache: Path) -> dict[str, Any] | None:
    path = cache / cell.file
    return json.loads(path.read_text()) if path.exists() else None


def text(cell: Cell, cache: Path) -> str:
    """What the table says of a cell."""
    hbm = cell.topology.chip.hbm_bytes
    possible = estimates(cell)
    if not possible:
        least = min((e.peak_bytes for e in candidates(cell.task, cell.topology)), default=0.0)
        return f"no: ≥ {least / GIB:.0f} of {hbm / GIB:.1f} GiB" if least else "no mesh divides it"
    found = kept(cell, cache)
    if found is None or "failed" in found:
        best = chosen(cell)
        fits = "fits?" if best.peak_bytes <= hbm else "tight"
        about = "~" if cell.task.mode == "train" else "> "
        why = "not compiled" if found is None else "did not compile"
        return f"*{fits} `{best.sizes}` ~{best.peak_bytes / GIB:.1f} GiB, {about}{duration(best.seconds)}; {why}*"
    memory = f"{'' if found.get('compiled', True) else '≥ '}{found['peak_bytes'] / GIB:.1f} GiB"
    if not found["fits"]:
        return f"no: `{found['mesh']}` needs {memory}"
    speed = f"{duration(found['predicted_seconds'])}, MFU {found['predicted_mfu']:.0%}"
    if cell.task.mode == "decode":
        speed = f"{duration(found['predicted_seconds'])} a token"
    return f"`{found['mesh']}` {memory}, {speed}"


INTRODUCTION = f"""\
# Qwen2 on TPU slices: what fits, and how fast it should be

Made by `python -m tools.plan_table` from `qwen2-jax plan`: the real step, compiled ahead of time without a TPU. Memory
is the compiler's account. Times are predictions, from its cycle estimates and published bandwidths; none was measured
on a TPU.

Training: float32 state, bfloat16 computation, full remat, one row a device; time a step. Prefill: 4,096 tokens, one
row a device. Decode: {DECODE_ROWS} rows a device with 4,096 tokens in the cache, weights in bfloat16 or int8, top-k and
top-p on; time a token. The mesh is the fastest by estimate of those that should fit.

- Plain cells were compiled, and say what the compiler says.
- *Cells in italics were **not compiled***: memory and time are rough arithmetic, a fifth to a half too much memory
  where it could be compared; `tight` is above the memory there is. Times of prefill and decode are bounds (`>`), from
  peak and bandwidth alone.
- `no: ≥` is arithmetic as well: no mesh over the slice comes near its memory.
""".splitlines()


def document(cache: Path) -> str:
    every = list(cells())
    compiled = [c for c in every if "peak_bytes" in (kept(c, cache) or {})]
    versions = sorted({(kept(c, cache) or {})["versions"]["libtpu"] for c in compiled})
    by = ", ".join(versions) or CALIBRATED_LIBTPU
    lines = [*INTRODUCTION, "", f"Compiled with libtpu {by}: {len(compiled)} of {len(every)} cells.", ""]
    for model in MODELS:
        lines += [f"## {model}", "", "| slice | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(text(Cell(model, name, column), cache) for column in MODES) + " |"
                  for name in SLICES]
        lines.append("")
    return "\n".join([*lines, *names()])


def names() -> list[str]:
    """The table slice → topology → chips → JAX devices."""
    lines = ["## Names of slices", "",
             "The number in a name counts cores on v2, v3, v4, v5p and tpu7x, and chips on v5e and v6e. A JAX device",
             "is a core on v2 and v3, a chip on v4, v5e, v5p and v6e, half a chip on tpu7x.", "",
             "| slice | topology | chips | JAX devices | usable HBM a device |", "|---|---|---|---|---|"]
    return [*lines, *(f"| {t.slice_name} | {t} | {t.chips} | {t.devices} | {t.chip.hbm_bytes / GIB:.2f} GiB |"
                      for t in slices()), ""]


def amount(text: str) -> float:
    """Of minutes or seconds, on a command line."""
    value = float(text)
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must lie between 0 and {MOST:,}, found {text}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "tpu_plans", metavar="DIR",
                        help="folder of finished cells (default: runs/tpu_plans)")
    parser.add_argument("--minutes", type=amount, default=0.0, metavar="N",
                        help="how long to compile before the document is written (default: 0, write what there is)")
    parser.add_argument("--cell-seconds", type=amount, default=900.0, metavar="S",
                        help="how long one cell may compile (default: 900)")
    parser.add_argument("--only", metavar="TEXT", help="compile cells whose file name holds this")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tpu_plans.md", metavar="FILE")
    args = parser.parse_args()
    try:
        check_writable(args.output)
        args.cache.mkdir(parents=True, exist_ok=True)
        _compile_some(args)
        with whole_file(args.output) as file:
            file.write(document(args.cache))
    except OSError as error:
        print(f"plan_table: {error.filename}: {error.strerror}", file=sys.stderr)
    except UserError as error:
        print(f"plan_table: {error}", file=sys.stderr)
    else:
        return 0
    return 2


def _compile_some(args: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * args.minutes
    for cell in cells():
        if time.monotonic() >= until:
            break
        if (args.only or "") in cell.file and kept(cell, args.cache) is None and estimates(cell):
            began = time.monotonic()
            compile_cell(cell, args.cache, args.cell_seconds)
            print(f"{cell.file} {time.monotonic() - began:.0f} s: {text(cell, args.cache)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
