"""`qwen2-jax data SUBCOMMAND`: text to token shards, and tools that look at, clean and hand out training data."""

from __future__ import annotations

import argparse
import importlib
import sys

from qwen2_jax.errors import UserError

# Each is a module `qwen2_jax/cli/data_<name>.py` with `add_parser(subparsers)`, as a command's is.
SUBCOMMANDS = ("prepare", "inspect", "dump", "quality")

DESCRIPTION = """\
Makes training data out of text. Begin with `qwen2-jax data prepare`, which turns documents into shards of tokens.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("data", help="prepare, inspect and clean training data", description=DESCRIPTION,
                                   epilog="`qwen2-jax data SUBCOMMAND --help` tells more of one.",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", title="subcommands")
    for name in SUBCOMMANDS:
        importlib.import_module(f"qwen2_jax.cli.data_{name}").add_parser(commands)

    def run(args: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        raise UserError(f"data needs a subcommand: {', '.join(SUBCOMMANDS)}")

    parser.set_defaults(run=run)
