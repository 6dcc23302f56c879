"""`qwen2-jax info`: what a model is, how many parameters it has and how much memory they take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError

ITEMSIZE = {"float32": 4, "bfloat16": 2, "int8": 1}
CACHE_DTYPES = ("float32", "bfloat16")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "info", help="configuration, parameters, memory",
        description="Show what a model is: its configuration, its parameters, the bytes they and the cache take.",
    )
    parser.add_argument("model", metavar="DIR|PRESET",
                        help="a folder with config.json, that file, or a published name such as Qwen2-7B-Instruct")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ignore-field", metavar="NAME", action="append", default=[],
                        help="pass over this field of config.json though it is unknown (may be repeated)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name, cfg = find_model(args.model, ignore=args.ignore_field)
    facts = describe(name, cfg)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts, cfg)))
    return 0


def find_model(name: str, *, ignore: list[str]) -> tuple[str, ModelConfig]:
    """The model of a path that exists, else of a published name.

    Raises:
      UserError: it is neither, or its config.json cannot be used.
    """
    from qwen2_jax import presets
    from qwen2_jax.checkpoint.hf_config import read_config

    if name and Path(name).exists():
        return name, read_config(name, ignore=ignore)
    published = presets.preset_name(name)
    if published is None:
        raise UserError(f"{name!r} is neither a folder nor a published model; {presets.suggestions(name)}")
    return published, presets.preset(name)


def describe(name: str, cfg: ModelConfig) -> dict[str, Any]:
    """All that the command tells, as plain data. Bytes of `int8` are one a parameter, without scales."""
    from qwen2_jax.checkpoint.hf_config import to_hf
    from qwen2_jax.shapes import count_params, kv_bytes_per_token

    count = count_params(cfg)
    return {
        "name": name,
        "parameters": {"total": count.total, "non_embedding": count.non_embedding, "active": count.active,
                       "active_non_embedding": count.active_non_embedding},
        "weight_bytes": {dtype: count.total * itemsize for dtype, itemsize in ITEMSIZE.items()},
        "kv_cache_bytes_per_token": {d: kv_bytes_per_token(cfg, itemsize=ITEMSIZE[d]) for d in CACHE_DTYPES},
        "context": {"max_position": cfg.max_position, "longest": cfg.longest_context},
        "windowed_layers": [i for i, windowed in enumerate(cfg.windowed_layers()) if windowed],
        "sparse_layers": [i for i in range(cfg.layers) if cfg.is_sparse(i)],
        "stop_ids": list(cfg.stop_ids),
        "config": to_hf(cfg),
    }


def _lines(facts: dict[str, Any], cfg: ModelConfig) -> list[str]:
    count = facts["parameters"]
    moe, windowed, sparse = cfg.moe, facts["windowed_layers"], facts["sparse_layers"]
    dense = f", feed-forward {cfg.d_ff:,}" if len(sparse) < cfg.layers else ""
    rows = [
        ("model", f"{facts['name']} ({facts['config']['architectures'][0]}, stored in {cfg.dtype})"),
        ("layers", f"{cfg.layers} of width {cfg.d_model:,}{dense}"),
        ("attention", f"{cfg.heads} query heads, {cfg.kv_heads} key-value heads, of width {cfg.head_dim}"),
        ("vocabulary", f"{cfg.vocab:,}, embeddings {'tied' if cfg.tied else 'not tied'}"),
        ("norm epsilon", f"{cfg.norm_eps:g}"),
        ("rope", _rope(cfg)),
        ("context", _context(facts["context"])),
        ("window", f"{cfg.window.size:,} tokens in layers {_ranges(windowed)}" if windowed else "none, full attention"),
        ("stop ids", ", ".join(map(str, facts["stop_ids"])) or "none"),
        ("parameters", f"{count['total']:,} ({count['total'] / 1e9:.2f} billion)"),
        ("  non-embedding", f"{count['non_embedding']:,}"),
        ("  active a token", f"{count['active']:,} ({count['active_non_embedding']:,} non-embedding)"),
        *((f"weights {dtype}", _bytes(size)) for dtype, size in facts["weight_bytes"].items()),
        *((f"cache {dtype}", f"{size:,} bytes a token") for dtype, size in facts["kv_cache_bytes_per_token"].items()),
    ]
    if moe is not None:
        rows.insert(2, ("experts", f"{moe.top_k} of {moe.experts} of width {moe.d_expert:,}, and a shared one of width "
                                   f"{moe.d_shared:,}, in layers {_ranges(sparse)}"))
    if cfg.head == "score":
        rows.insert(1, ("labels", ", ".join(cfg.label_names) if cfg.label_names else str(cfg.labels)))
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {text}" for label, text in rows]


def _rope(cfg: ModelConfig) -> str:
    rope = cfg.rope
    text = f"{rope.kind}, theta {rope.theta:,.15g}"
    if rope.kind == "default":
        return text
    original = f", original length {rope.original_max_position:,}" if rope.original_max_position else ""
    return f"{text}, factor {rope.factor:g}{original}"


def _context(context: dict[str, int]) -> str:
    if context["longest"] == context["max_position"]:
        return f"{context['max_position']:,} tokens"
    return (f"{context['longest']:,} tokens, one chunk of dual chunk attention; "
            f"{context['max_position']:,} in config.json")


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans) or "none"


def _bytes(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"
