"""Flags that commands running a model share: which model, and how to sample from it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.roll_call import COORDINATOR

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "truncate", "n")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR",
                       help="checkpoint: a Hugging Face or Orbax folder, a .safetensors file, or a hub repository")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="what to compute in (default: as config.json says)")
    group.add_argument("--mesh", metavar="SPEC",
                       help="axes of devices to use, like data=4 or fsdp=2x2,tensor=2 (default: one device)")
    group.add_argument("--quant", choices=("int8",),
                       help="hold matrices in int8: half of bfloat16's memory, nearly the same answers")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    group.add_argument("--rope-when", choices=("always", "long"), default="always",
                       help="scale RoPE always, or only for requests beyond the original context (default: always)")
    group.add_argument("--ignore-field", action="append", default=[], metavar="NAME",
                       help="pass over a field of config.json that is not supported (may be repeated)")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "What is left out comes from generation_config.json.")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P",
                       help="sample from the smallest set of tokens of this probability")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; 0 is off")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 discourages tokens seen before")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text (may be repeated)")
    group.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    group.add_argument("--truncate", choices=("left",), help="drop the front of a prompt that is too long")


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `LM.generate` that the flags give, checked: before a model is loaded, which may take minutes."""
    from qwen2_jax.serve.defaults import check_settings

    settings = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    check_settings(**settings)
    return settings


def join_processes(args: argparse.Namespace) -> bool:
    """Join the other processes of the program, if there are any (sharding/distributed.py): whether this one speaks.

    Raises UserError: a process is absent, or --mesh does not say how several share the work.
    """
    if not os.environ.get(COORDINATOR):
        return True     # JAX is not needed to know that
    from qwen2_jax.sharding import distributed

    distributed.start()
    if distributed.count() > 1 and not args.mesh:
        raise UserError(f"{distributed.count()} processes were started: --mesh must say how they share the work")
    return distributed.is_first()


def load_model(args: argparse.Namespace):
    """The model that the flags name; compilations are told on stderr."""
    import qwen2_jax

    return qwen2_jax.load(args.model, dtype=args.dtype, mesh=args.mesh, quant=args.quant, revision=args.revision,
                          ignore_fields=args.ignore_field, rope_when=args.rope_when, notify=tell)


def tell(line: str) -> None:
    """A line for the person, on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"qwen2-jax: {line}", file=sys.stderr)
