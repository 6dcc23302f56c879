"""True widths against transformers, float32, each framework in a process of its own.   make parity-big

One-layer slices of Qwen2-72B and Qwen2-57B-A14B (all 64 experts) with the vocabulary cut to 2,048 rows: 16 GB of
memory, some minutes. Writes docs/parity_big.md and docs/parity_big.json. The tests run the smaller shapes of `SHAPES`.
Both processes draw the same weights by name, so none are exchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_jax.checkpoint.hf_config import to_hf
from qwen2_jax.checkpoint.names import Slot, fused_experts, slots
from qwen2_jax.checkpoint.tree import nested
from qwen2_jax.config import ModelConfig
from qwen2_jax.presets import preset
from qwen2_jax.shapes import count_params, param_shapes
from tools.telling_weights import draw

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 48


class Shape(NamedTuple):
    """A published model, or its first layers with the vocabulary cut."""

    model: str
    layers: int | None = None
    vocab: int | None = None

    @property
    def config(self) -> ModelConfig:
        cfg = preset(self.model)
        return dataclasses.replace(cfg, layers=self.layers or cfg.layers, vocab=self.vocab or cfg.vocab,
                                   bos_id=None, eos_ids=(), pad_id=None, dtype="float32")


SHAPES = {
    "0.5B": Shape("Qwen2-0.5B"),
    "7B-slice": Shape("Qwen2-7B", layers=1, vocab=2048),
    "72B-slice": Shape("Qwen2-72B", layers=1, vocab=2048),
    "57B-A14B-slice": Shape("Qwen2-57B-A14B", layers=1, vocab=2048),
}
BIG = ("72B-slice", "57B-A14B-slice")

# Float32 on both sides: sums of up to 29,568 terms in another order. Sharp attention multiplies an error by a small
# factor a layer, so that 24 layers bring ten times that of one. Measured: 1e-5 for a slice, 1.1e-4 for the 0.5B.
TOLERANCE = {"72B-slice": 5e-5, "57B-A14B-slice": 5e-5, "7B-slice": 5e-5, "0.5B": 5e-4}


def token_ids(cfg: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, cfg.vocab, (1, TOKENS)).astype(np.int32)


def run_transformers(cfg: ModelConfig) -> dict[str, np.ndarray]:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**to_hf(cfg))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu").eval()
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for name, p in model.named_parameters():
        value = p.detach().numpy()
        parts = fused_experts(name, value.shape)
        for part, shape, first in parts or [(name, value.shape, 0)]:
            draw(part, value.reshape(-1)[first:first + int(np.prod(shape))].reshape(shape), tied=cfg.tied_head)
    hidden: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: hidden.append(out[0].numpy()))
    with torch.no_grad():
        logits = model(torch.tensor(token_ids(cfg)).long()).logits[0].numpy()
    return {"logits": logits, "hidden": np.stack(hidden)}


def run_ours(cfg: ModelConfig) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.model.decoder import Decoder
    from qwen2_jax.ops.vocab import logits

    leaves = {path: np.empty(shape, np.float32) for path, shape in param_shapes(cfg, stacked=False).items()}
    for slot in slots(cfg):
        path, index = _unstacked(slot)
        draw(slot.name, leaves[path][index], tied=cfg.tied_head)
    # Waiting for each copy frees what it was made from.
    params = nested({path: jnp.asarray(leaves.pop(path)).block_until_ready() for path in list(leaves)})

    @jax.jit
    def run(params, ids):
        out: Any = Decoder(cfg, stacked=False, train=False, collect=True).apply({"params": params}, ids)
        return logits(out.x_BTD, out.head["table"])[0], out.hidden_LBTD[:, 0]

    found, hidden = run(params, token_ids(cfg))
    return {"logits": np.asarray(found), "hidden": np.asarray(hidden)}


def _unstacked(slot: Slot) -> tuple[str, tuple[int, ...]]:
    """A slot's path and index where each layer is a run of its own."""
    run, _, rest = slot.path.partition("/")
    if not run.startswith("layers_"):
        return slot.path, slot.index
    return f"layers_{int(run.removeprefix('layers_')) + slot.index[0]}/{rest}", (0, *slot.index[1:])


SIDES = {"transformers": run_transformers, "ours": run_ours}


def compare(name: str) -> dict:
    """Run both sides, one after the other → the row of the report."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for side in SIDES:
            out = Path(folder) / f"{side}.npz"
            command = [sys.executable, "-m", "tools.parity_big", "--side", side, "--shape", name, "--out", str(out)]
            subprocess.run(command, check=True, cwd=ROOT)
            found[side] = dict(np.load(out))
    theirs, ours = found["transformers"], found["ours"]
    cfg = SHAPES[name].config
    return {
        "shape": name, "model": SHAPES[name].model, "layers": cfg.layers, "vocab": cfg.vocab, "tokens": TOKENS,
        "parameters": count_params(cfg).total,
        "logits_std": float(theirs["logits"].std()),
        "logits_error": float(np.abs(ours["logits"] - theirs["logits"]).max() / theirs["logits"].std()),
        "hidden_error": float(max(np.abs(a - b).max() / b.std()
                                  for a, b in zip(ours["hidden"], theirs["hidden"], strict=True))),
        "top1_agreement": float(np.mean(ours["logits"].argmax(-1) == theirs["logits"].argmax(-1))),
        "tolerance": TOLERANCE[name],
        "peak_gb": {side: round(float(found[side]["peak_gb"]), 2) for side in SIDES},
    }


def report(rows: list[dict]) -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "transformers", "torch"))
    lines = [
        "# Parity at the widths of the large models",
        "",
        "Command: `make parity-big`. One-layer slices at true width, vocabulary cut to 2,048 rows, float32, random",
        "weights drawn so that mistakes show (`tools/telling_weights.py`), 48 tokens; each framework in a process of",
        "its own. Errors are the largest absolute difference over the standard deviation of transformers' values.",
        "",
        f"Measured {datetime.date.today().isoformat()} at commit {git.stdout.strip()} with {versions}, "
        f"Python {platform.python_version()}, CPU.",
        "",
        "| slice | parameters | logits | hidden state | same top token | tolerance | peak GB: theirs, ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['model']}, {row['layers']} layer | {row['parameters']:,} | {row['logits_error']:.1e} "
                     f"| {row['hidden_error']:.1e} | {row['top1_agreement']:.0%} | {row['tolerance']:.0e} "
                     f"| {row['peak_gb']['transformers']}, {row['peak_gb']['ours']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two large slices, with a report")
    parser.add_argument("--side", choices=SIDES, help="run one framework and save what it finds in --out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.side:
        found = SIDES[args.side](SHAPES[args.shape[0]].config)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9     # Linux counts in KiB
        np.savez(args.out, allow_pickle=False, peak_gb=np.float64(peak), **found)
        return
    rows = []
    for name in args.shape or BIG:
        rows.append(compare(name))
        print(json.dumps(rows[-1]), flush=True)
    if not args.shape:
        text = report(rows)     # asks git whether the tree is clean, so before anything is written
        (ROOT / "docs/parity_big.json").write_text(json.dumps(rows, indent=2) + "\n")
        (ROOT / "docs/parity_big.md").write_text(text)
    beyond = [row["shape"] for row in rows if max(row["logits_error"], row["hidden_error"]) > row["tolerance"]]
    if beyond:
        sys.exit(f"beyond the tolerance: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
