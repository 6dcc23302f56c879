"""Our training step and MaxText's, compiled for the same TPU slice and read by the same code.

    python -m tools.yardstick --maxtext PYTHON [--cases 7b_v5e-16_b1,…] [--minutes N]

PYTHON runs MaxText: an environment of Python 3.12 with `maxtext[tpu]==0.2.4` and the JAX and libtpu of this one, named
beside the results. Score: seconds of fusions, kernels and exposed collectives, as `qwen2-jax plan` reads them of either
program. Both hold float32 state, compute in bfloat16 and recompute everything (full remat). MaxText has no Qwen2 but
2.5's; its widths are set to the preset's, and of the 57B-A14B it leaves out the shared expert, which it cannot express.

Results are kept in the folder `--cache`, so that a run goes on where the last one stopped. On stdout one JSON object a
case; `score_ratio` and `peak_ratio` are ours over the better of MaxText's variants (below 1: we are ahead), null where
either has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_jax.cli.output import whole_file
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.plan import plan
from qwen2_jax.plan.compiled import out_of_memory
from qwen2_jax.plan.hlo import parse
from qwen2_jax.plan.topology import parse_topology, tpu_devices
from qwen2_jax.presets import PRESETS
from tools.plan_table import amount, planned

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tools" / "yardstick_maxtext.py"
NO_RINGS = "compile_xla_flags=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
VARIANTS: dict[str, Callable[[int], list[str]]] = {
    "no rings": lambda n: [f"ici_fsdp_parallelism={n}", NO_RINGS],
    "rings": lambda n: [f"ici_fsdp_parallelism={n}"],
    "tensor 4": lambda n: [f"ici_fsdp_parallelism={n // 4}", "ici_tensor_parallelism=4", NO_RINGS],
}
"""Of MaxText: name → settings for n devices. Rings are XLA's products that overlap their own gathers."""


@dataclass(frozen=True)
class Case:
    model: str
    slice: str
    mesh: str
    rows: int
    """Of each device."""
    seq: int

    @property
    def name(self) -> str:
        size = self.model.removeprefix("Qwen2-").partition("-")[0].lower()
        return f"{size}_{self.slice}_b{self.rows}" + ("" if self.seq == 4096 else f"_{self.seq // 1024}k")


MESHES = {
    "Qwen2-7B": {"v5e-16": "fsdp=4x4", "v6e-16": "fsdp=4x4", "v5p-8": "fsdp=2x2", "v5p-32": "fsdp=2x2x4",
                 "v5e-256": "fsdp=16x16"},
    "Qwen2-72B": {"v5p-128": "fsdp=4x4x4", "v5e-256": "fsdp=16x16", "v6e-256": "fsdp=16x16"},
    "Qwen2-57B-A14B": {"v5p-128": "fsdp=4x4,expert=4", "v5e-256": "fsdp=16x4,expert=4",
                       "v6e-256": "fsdp=16x4,expert=4"},
}
CASES = {case.name: case for case in (
    Case(model, name, mesh, rows, seq) for model, of in MESHES.items()
    for rows, seq in ((1, 4096), (4, 4096), (2, 4096), (1, 32768)) for name, mesh in of.items())}


def maxtext_settings(cfg: ModelConfig) -> list[str]:
    """The nearest of MaxText's models, with this one's sizes."""
    sizes = {"base_emb_dim": cfg.d_model, "base_num_query_heads": cfg.heads, "base_num_kv_heads": cfg.kv_heads,
             "head_dim": cfg.head_dim, "base_num_decoder_layers": cfg.layers, "vocab_size": cfg.vocab,
             "base_mlp_dim": cfg.d_ff}
    if cfg.moe is None:
        nearest = {"model_name": "qwen2.5-7b", "logits_via_embedding": cfg.tied}
    else:
        sizes |= {"base_mlp_dim": cfg.moe.d_expert, "base_moe_mlp_dim": cfg.moe.d_expert,
                  "num_experts": cfg.moe.experts, "num_experts_per_tok": cfg.moe.top_k}
        nearest = {"model_name": "qwen3-30b-a3b", "use_qk_norm": False, "norm_topk_prob": cfg.moe.norm_topk_prob,
                   "attention_bias": True}
    return [f"{name}={str(value).lower()}" for name, value in
            {**nearest, "override_model_config": True, **sizes}.items()]


def ours(case: Case, seconds: float) -> dict[str, Any]:
    """What `qwen2-jax plan` says of it."""
    devices = parse_topology(case.slice).devices
    found = planned(["plan", case.model, "--topology", case.slice, "--mesh", case.mesh, "--seq", str(case.seq),
                     "--batch", str(case.rows * devices), "--json"], seconds)
    if "failed" in found:
        return {"error": found["failed"]}
    if not found["fits"]:
        return {"fits": False, "peak_bytes": found["peak_bytes"]}
    return figures(found, [(row["kind"], row["bytes"]) for row in found["collectives"]], found["fusion_seconds"],
                   found["kernel_seconds"], found["exposed_collective_seconds"])


def maxtext(case: Case, variant: str, python: str, seconds: float) -> dict[str, Any]:
    """The same of MaxText's program."""
    topology = parse_topology(case.slice)
    settings = [*maxtext_settings(PRESETS[case.model]), f"max_target_length={case.seq}",
                f"per_device_batch_size={case.rows}", *VARIANTS[variant](topology.devices)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step"
        command = [python, str(WORKER), str(out), str(topology), str(topology.devices), *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=folder)
        if not (report := out.with_suffix(".json")).exists():
            said = done.stderr.strip().splitlines()
            return {"error": said[-1] if said else f"ended with status {done.returncode}"}
        found = json.loads(report.read_text(encoding="utf-8"))
        if "error" in found:
            memory = out_of_memory(found["error"])
            return {"fits": False, "peak_bytes": memory.used_bytes} if memory else {"error": found["error"][:500]}
        return read(found, out.with_suffix(".hlo").read_text(encoding="utf-8"), case)


def check_interpreter(python: str) -> None:
    """Raises UserError where it does not run, or has no MaxText."""
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('maxtext') is None)"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"--maxtext {python} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"--maxtext {python} has no MaxText: it must be the Python of an environment with "
                        "maxtext[tpu]==0.2.4")


def read(found: dict[str, Any], text: str, case: Case) -> dict[str, Any]:
    """The figures of a program that is not ours: no loop of it has a bound that only runs can tell."""
    topology = parse_topology(case.slice)
    devices = tpu_devices(topology)
    at = {(*device.coords, device.core_on_chip): device for device in devices}
    placed = [at[tuple(place)] for place in found["places"]]
    rows, work = plan.read(parse(text), topology, found["mesh"], placed, devices)
    return figures(found, [(row.kind, row.bytes) for row in rows], work.fusions, work.kernels,
                   sum(row.exposed_seconds for row in rows))


def figures(memory: dict[str, Any], collectives: list[tuple[str, float]], fusions: float, kernels: float,
            exposed: float) -> dict[str, Any]:
    return {"fits": True, "score": fusions + kernels + exposed, "fusion_seconds": fusions, "kernel_seconds": kernels,
            "exposed_collective_seconds": exposed, "argument_bytes": memory["argument_bytes"],
            "peak_bytes": memory["peak_bytes"],
            "all_reduce_bytes": sum(size for kind, size in collectives if kind == "all-reduce")}


def compared(case: Case, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One line of the result."""
    theirs = [side for name, side in sides.items() if name != "ours" and "score" in side]
    best = min(theirs, key=lambda side: side["score"], default=None)
    line: dict[str, Any] = {"case": case.name, **dataclasses.asdict(case), **sides}
    for ratio, key in (("score_ratio", "score"), ("peak_ratio", "peak_bytes")):
        mine = sides.get("ours", {}).get(key)
        line[ratio] = round(mine / best[key], 4) if best and mine and "score" in sides["ours"] else None
    return line


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from the cache, or made and put there; one that ran out of time is tried again."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        found = make()
    except subprocess.TimeoutExpired as error:
        return {"error": f"compiling took more than {error.timeout:.0f} seconds"}
    with whole_file(path) as file:
        json.dump(found, file, indent=1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON", help="an interpreter that has MaxText; without it, ours alone")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas (default: all)")
    parser.add_argument("--variants", default="no rings", help=f"of MaxText: {', '.join(VARIANTS)} (default: no rings)")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "yardstick", metavar="DIR",
                        help="folder of finished compilations (default: runs/yardstick)")
    parser.add_argument("--minutes", type=amount, default=float("inf"), metavar="N", help="when to begin no other case")
    parser.add_argument("--seconds", type=amount, default=1800.0, metavar="S", help="how long one may compile")
    args = parser.parse_args()
    names, variants = args.cases.split(","), args.variants.split(",") if args.maxtext else []
    for given, known in ((names, CASES), (variants, VARIANTS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"'{unknown[0]}' is none of {', '.join(known)}")
    try:
        if args.maxtext:
            check_interpreter(args.maxtext)
        args.cache.mkdir(parents=True, exist_ok=True)
        _compare(args, names, variants)
    except OSError as error:
        print(f"yardstick: {error.filename}: {error.strerror}", file=sys.stderr)
    except UserError as error:
        print(f"yardstick: {error}", file=sys.stderr)
    else:
        return 0
    return 2


def _compare(args: argparse.Namespace, names: list[str], variants: list[str]) -> None:
    until = time.monotonic() + 60 * args.minutes
    for case in (CASES[name] for name in names):
        if time.monotonic() >= until:
            break
        sides = {"ours": kept(args.cache / f"{case.name}_ours.json", lambda case=case: ours(case, args.seconds))}
        for name in variants:
            sides[name] = kept(args.cache / f"{case.name}_{name.replace(' ', '-')}.json",
                               lambda case=case, name=name: maxtext(case, name, args.maxtext, args.seconds))
        print(json.dumps(compared(case, sides)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
