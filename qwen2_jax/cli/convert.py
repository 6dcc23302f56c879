"""`qwen2-jax convert SRC DST --to orbax|safetensors`: weights between Hugging Face's form and ours."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = """\
Converts a checkpoint, in host memory bounded by a few pieces of 16 MiB. DST appears complete or not at all.

SRC is a Hugging Face folder, a .safetensors file with config.json beside it, an Orbax checkpoint (also a training run's
folder or one of its steps), or a repository of the Hugging Face hub.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("convert", help="convert a checkpoint between Hugging Face and Orbax",
                                   description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="checkpoint to read, or a hub repository (owner/name)")
    parser.add_argument("dst", metavar="DST", help="folder to make; it must not exist")
    parser.add_argument("--to", choices=("orbax", "safetensors"), required=True, help="what to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "keep"), default="keep",
                        help="what to store the weights in (default: keep, every bit as it is)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE",
                        help="largest safetensors file, like 5GB or 2GiB (default: 5GB)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    parser.add_argument("--verify", action="store_true",
                        help="read both sides again and compare weights and predictions before DST gets its name")
    parser.add_argument("--ignore-field", action="append", default=[], metavar="NAME",
                        help="pass over a field of config.json that is not supported (may be repeated)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint.convert import convert

    comparison = convert(args.src, args.dst, to=args.to, dtype=args.dtype, max_shard_size=args.max_shard_size,
                         revision=args.revision, verify=args.verify, ignore=args.ignore_field, progress=True)
    if comparison is not None:
        print(comparison.summary())
    print(f"wrote {args.dst}", file=sys.stderr)
    return 0
