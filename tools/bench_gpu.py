"""One NVIDIA GPU: training and decoding, ours against transformers with SDPA and torch.compile. One JSON line a row.

    python -m tools.bench_gpu [--rows train_0.5b_4k,decode_1.5b_b8] [--minutes 8]

Same card, shapes, random weights' distribution, dtypes and numbers of tokens on both sides: float32 weights and AdamW,
bfloat16 products for training (autocast on theirs); bfloat16 throughout for decoding. Rows of a batch are one document
each, unpadded. Training rows say `recompute`: whether both sides recompute activations in the backward pass.

A side of a row is a process of its own, which gets what is left of the time, shared out evenly; `error` says what
became of one that gives no number: out of memory, out of time, or its last words. `tokens_per_second` and, for
training, `mfu`: the model's FLOPs (6 for each active parameter and token, and 12 x layers x heads x head width x half a
row for attention; recomputation is not counted) over the card's bfloat16 peak, null for a card that PEAK does not list.
`bandwidth_share` of decoding: bytes of weights over time a step, over the card's memory bandwidth.

Without a GPU it prints "not measured" and exits with status 0. The transformers side needs torch for CUDA. Neither side
was run on a GPU when this was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDES = ("ours", "transformers")
WORKER = "tools.bench_gpu_worker"

# Dense bfloat16 FLOP/s and bytes/s of memory, from NVIDIA's datasheets of each; the longest name that fits counts.
PEAK = {
    "A100-SXM4-40GB": (312e12, 1.555e12), "A100-PCIE-40GB": (312e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 2.039e12), "A100 80GB PCIe": (312e12, 1.935e12),
    "H100 80GB HBM3": (989e12, 3.35e12), "H100 PCIe": (756e12, 2.0e12), "H100 NVL": (835e12, 3.9e12),
    "H200": (989e12, 4.8e12), "L4": (121e12, 0.3e12), "L40S": (362e12, 0.864e12),
}


@dataclass(frozen=True)
class Row:
    """What is measured: `tokens` a row, of `batch` rows; for decoding the prompt, then `new` tokens."""

    kind: str
    preset: str
    batch: int
    tokens: int
    layers: int | None = None
    """Of a slice; None for all."""
    recompute: bool = False
    new: int = 0


ROWS = {
    "train_0.5b_4k": Row("train", "Qwen2-0.5B", 4, 4096),
    "train_1.5b_4k": Row("train", "Qwen2-1.5B", 4, 4096),
    "train_7b_slice_4k": Row("train", "Qwen2-7B", 4, 4096, layers=4),
    "train_0.5b_32k": Row("train", "Qwen2-0.5B", 1, 32768, recompute=True),
    "train_1.5b_32k": Row("train", "Qwen2-1.5B", 1, 32768, recompute=True),
    "train_7b_slice_32k": Row("train", "Qwen2-7B", 1, 32768, layers=4, recompute=True),
    "decode_1.5b_b1": Row("decode", "Qwen2-1.5B", 1, 512, new=128),
    "decode_1.5b_b8": Row("decode", "Qwen2-1.5B", 8, 512, new=128),
    "decode_7b_slice_b8": Row("decode", "Qwen2-7B", 8, 512, layers=8, new=128),
}


def config(row: Row):
    """The row's `ModelConfig`."""
    from qwen2_jax.presets import PRESETS

    cfg = PRESETS[row.preset]
    return dataclasses.replace(cfg, layers=row.layers or cfg.layers, max_position=max(cfg.max_position, row.tokens))


def model_flops(row: Row) -> float:
    """Of one training step, both passes."""
    from qwen2_jax.plan import flops

    return flops.model_flops(config(row), "train", row.batch, row.tokens)


def cards() -> list[str]:
    """Names of the NVIDIA GPUs of this machine."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    asked = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def peaks(card: str) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a card."""
    known = [name for name in PEAK if name in card]
    return PEAK[max(known, key=len)] if known else None


def measure(command: list[str], seconds: float) -> dict[str, Any]:
    """The JSON object on the last line of a process, or {"error": what became of it}."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"error": f"out of time ({seconds:.0f} s)"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if any("RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower() for line in said):
        return {"error": "out of memory"}
    return {"error": said[-1].strip() if said else f"ended with status {done.returncode}"}


def figures(row: Row, result: dict[str, Any], peak: tuple[float, float] | None) -> dict[str, Any]:
    """What a side's line says of its measurement {"seconds": a step, "weight_bytes": …}."""
    if "error" in result:
        return result
    seconds = result["seconds"]
    tokens = row.batch * (row.tokens if row.kind == "train" else 1)
    out = {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 5),
           "peak_memory_gib": result["peak_memory_gib"]}
    if row.kind == "train":
        return out | {"mfu": peak and round(model_flops(row) / seconds / peak[0], 4)}
    return out | {"bandwidth_share": peak and round(result["weight_bytes"] / seconds / peak[1], 4)}


def compare(name: str, card: str, allowance: float) -> dict[str, Any]:
    """One line of the result, from both sides."""
    row, peak = ROWS[name], peaks(card)
    sides = {side: figures(row, measure([sys.executable, "-m", WORKER, side, name], allowance / len(SIDES)), peak)
             for side in SIDES}
    ours, theirs = (sides[side].get("tokens_per_second") for side in SIDES)
    ratio = round(ours / theirs, 3) if ours and theirs else None
    return {"row": name, "card": card, **dataclasses.asdict(row), **sides, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--minutes", type=float, default=8, help="for all rows together (default: 8)")
    args = parser.parse_args()
    names = args.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(ROWS)}")
    if not (found := cards()):
        print("not measured: this machine has no NVIDIA GPU")
        return
    end = time.monotonic() + 60 * args.minutes
    for i, name in enumerate(names):
        left = (end - time.monotonic()) / (len(names) - i)
        print(json.dumps(compare(name, found[0], max(left, 1))), flush=True)


if __name__ == "__main__":
    main()
