"""`qwen2-jax upcycle SRC DST`: a mixture of experts made of a dense model, to go on training."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from qwen2_jax.config import ModelConfig, MoeConfig
from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.checkpoint.upcycle import Upcycled

DESCRIPTION = """\
Makes a mixture of experts of a dense model, as Qwen2-57B-A14B was made of Qwen2-7B (Qwen2 report, section 2.2.2). Each
feed-forward network is copied until there is enough for all experts, each copy is shuffled along its width, experts are
cut out of the copies, and half of each expert's parameters is drawn anew. All other weights are copied.

The result is where training begins, not a better model: with what is drawn anew it predicts worse than SRC until it has
been trained. With --preserve it predicts what SRC does, up to rounding.

SRC is a dense checkpoint: a Hugging Face folder, an Orbax checkpoint (also a training run's folder or one of its
steps), or a repository of the Hugging Face hub. It is read a matrix at a time. DST appears complete or not at all, and
depends on SRC and the flags alone.
"""

EPILOG = """\
examples:
  qwen2-jax upcycle Qwen/Qwen2-7B moe --to orbax --like Qwen2-57B-A14B
  qwen2-jax upcycle Qwen2-0.5B moe --to safetensors --experts 16 --top-k 4 --expert-width 608 --shared-width 4864
  qwen2-jax upcycle Qwen2-0.5B same --to orbax --experts 16 --expert-width 608 --shared-width 608 \\
      --preserve --dtype float32
"""

SIZES = {"experts": "experts", "top_k": "top_k", "expert_width": "d_expert", "shared_width": "d_shared"}
"""Flags and the fields of `MoeConfig` that they set."""
CHOICES = ("cut", "reinit", "reinit_share", "init", "shared", "router_std", "shared_gate_std", "seed", "preserve")
"""Flags that are fields of `Upcycling`."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("upcycle", help="make a mixture of experts of a dense model",
                                   description=DESCRIPTION, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="dense checkpoint to read, or a hub repository (owner/name)")
    parser.add_argument("dst", metavar="DST", help="folder to make; it must not exist")
    parser.add_argument("--to", choices=("orbax", "safetensors"), required=True, help="what to write")
    _add_sizes(parser.add_argument_group("experts", "Either --like, or the four sizes; a size beside --like wins."))
    _add_choices(parser.add_argument_group("how they are made", "What the report leaves open, and --reinit-share."))
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "keep"), default="keep",
                        help="what to store the weights in (default: keep, as SRC has them)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE",
                        help="largest safetensors file, like 5GB or 2GiB (default: 5GB)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    parser.add_argument("--ignore-field", action="append", default=[], metavar="NAME",
                        help="pass over a field of config.json that is not supported (may be repeated)")
    parser.set_defaults(run=run)


def _add_sizes(group) -> None:
    group.add_argument("--like", metavar="PRESET",
                       help="a published mixture of experts, such as Qwen2-57B-A14B: its experts, and its vocabulary's "
                            "rows (padding beyond them is dropped); SRC must have its width, layers and heads")
    group.add_argument("--experts", type=int, metavar="N", help="routed experts a layer")
    group.add_argument("--top-k", type=int, metavar="K",
                       help="experts that a token goes to; all of them with --preserve, which needs no --top-k")
    group.add_argument("--expert-width", type=int, metavar="W", help="intermediate width of a routed expert")
    group.add_argument("--shared-width", type=int, metavar="W", help="intermediate width of the shared expert")
    group.add_argument("--norm-topk-prob", action=argparse.BooleanOptionalAction, default=None,
                       help="whether the K chosen experts' weights are made to add up to 1 (default: no, as published)")


def _add_choices(group) -> None:
    group.add_argument("--cut", choices=("across", "within"), default="across",
                       help="across: copies lie end to end and an expert may span two; the fewest copies, the report's "
                            "number. within: each expert lies in one copy, whose rest is discarded (default: across)")
    group.add_argument("--reinit", choices=("elements", "units"), default="elements",
                       help="what is drawn anew. elements: each element of an expert's matrices by itself, at random. "
                            "units: whole units, a row of gate and up and the column of down (default: elements)")
    group.add_argument("--reinit-share", type=float, metavar="P",
                       help="part of each routed expert that is drawn anew, 0 to 1 (default: 0.5, the report's; 0 with "
                            "--preserve)")
    group.add_argument("--init", choices=("config", "matched"), default="config",
                       help="standard deviation of what is drawn anew. config: initializer_range of config.json. "
                            "matched: that of the dense matrix it replaces (default: config)")
    group.add_argument("--shared", choices=("copy", "cut", "random"), default="copy",
                       help="the shared expert. copy: computes what the dense network does (a narrower one has a "
                            "random part of its units, a wider one more units that add nothing yet). cut: cut out of "
                            "the copies and drawn anew in part, as routed experts are. random: drawn anew (default: "
                            "copy)")
    group.add_argument("--router-std", type=float, metavar="S",
                       help="standard deviation of the router (default: initializer_range; 0 with --preserve)")
    group.add_argument("--shared-gate-std", type=float, default=0.0, metavar="S",
                       help="that of the shared expert's gate (default: 0, half open for every token)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    group.add_argument("--preserve", action="store_true",
                       help="keep what the model computes: router zero, all experts chosen, down projections scaled "
                            "for it, that of the shared expert zero, nothing drawn anew; exact to 1e-5 in float32")


def run(args: argparse.Namespace) -> int:
    like = _preset(args.like) if args.like is not None else None
    moe = _experts(args, like)

    from qwen2_jax.checkpoint.fine_grained import Upcycling
    from qwen2_jax.checkpoint.upcycle import upcycle

    how = Upcycling(**{name: getattr(args, name) for name in CHOICES})
    made = upcycle(args.src, args.dst, moe, how, to=args.to, like=like, dtype=args.dtype,
                   max_shard_size=args.max_shard_size, revision=args.revision, ignore=args.ignore_field, progress=True)
    print("\n".join(_lines(made)))
    print(f"wrote {args.dst}", file=sys.stderr)
    return 0


def _preset(name: str) -> ModelConfig:
    """The published mixture of experts of that name; raises UserError for any other."""
    from qwen2_jax.presets import PRESETS, preset_name

    sparse = {known: cfg for known, cfg in PRESETS.items() if cfg.moe is not None}
    published = preset_name(name)
    if published not in sparse:
        raise UserError(f"--like {name} is no published mixture of experts; these are {', '.join(sparse)}")
    return sparse[published]


def _experts(args: argparse.Namespace, like: ModelConfig | None) -> MoeConfig:
    """The experts that the flags ask for."""
    base = like.moe if like is not None else None
    sizes: dict[str, Any] = {}
    for name, field in SIZES.items():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} must be at least 1, found {value}")
        if value is not None or base is not None:
            sizes[field] = value if value is not None else getattr(base, field)
    if args.preserve and "experts" in sizes:
        if args.top_k not in (None, sizes["experts"]):
            raise UserError(f"--preserve sends every token to all {sizes['experts']} experts, found --top-k"
                            f" {args.top_k}: leave it out")
        sizes["top_k"] = sizes["experts"]
    missing = [_flag(name) for name, field in SIZES.items()
               if field not in sizes and not (args.preserve and field == "top_k")]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give all sizes of the"
                        " experts, or --like a published model")
    if sizes["top_k"] > sizes["experts"]:
        raise UserError(f"--top-k {sizes['top_k']} is more than the {sizes['experts']} experts")
    moe = MoeConfig(**sizes) if base is None else dataclasses.replace(base, **sizes)
    return moe if args.norm_topk_prob is None else dataclasses.replace(moe, norm_topk_prob=args.norm_topk_prob)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _lines(made: Upcycled) -> list[str]:
    from qwen2_jax.shapes import count_params

    cfg, count = made.cfg, count_params(made.cfg)
    assert cfg.moe is not None
    times = str(made.most) if made.least == made.most else f"{made.least} to {made.most}"
    return [
        f"experts     {cfg.moe.experts} of width {cfg.moe.d_expert:,} a layer, {cfg.moe.top_k} for each token; and a "
        f"shared one of width {cfg.moe.d_shared:,}",
        f"cut out of  copies of {cfg.d_ff:,} units: {made.copies}; times that a unit occurs: {times}",
        f"vocabulary  {cfg.vocab:,} rows",
        f"parameters  {count.total:,}, of which {count.active:,} are active for a token",
    ]
