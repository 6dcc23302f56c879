"""The argument parser of every command: one-line errors, near matches for what was mistyped."""

from __future__ import annotations

import argparse
import difflib
import importlib

from qwen2_jax import __version__
from qwen2_jax.errors import UserError

# Each is a module `qwen2_jax/cli/<name>.py` with `add_parser(subparsers)`, which imports nothing heavy and ends in
# `parser.set_defaults(run=run)`, and `run(args) -> int`, the exit status.
COMMANDS = ("info", "convert", "upcycle", "generate", "chat", "train", "plan", "doctor", "data")


class Parser(argparse.ArgumentParser):
    """`argparse` whose errors are `UserError`s, and which never takes `--max` for `--max-new-tokens`."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (`{self.prog} --help` lists what there is)")

    def _get_values(self, action, arg_strings):
        # Python 3.11 takes the value of `--stop=--` for the end of flags and hands on an empty list.
        if action.nargs is None and action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action, value):
        choices = [str(choice) for choice in action.choices or ()]
        if choices and value not in action.choices:
            name = "command" if isinstance(action, argparse._SubParsersAction) else "/".join(action.option_strings)
            self.error(f"{name} {value!r} does not exist{_near(str(value), choices)} choose from {', '.join(choices)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace; `run` in it is None when no command was given.

    Raises:
      UserError: an unknown command, flag or value.
    """
    parser, _ = build_parser()
    known, words = parser, [word for word in argv if not word.startswith("-")]
    while words and words[0] in _commands(known):
        known = _commands(known)[words.pop(0)]
    if not (words and _commands(known)):        # an unknown command is argparse's to refuse
        _check_flags(known, parser, argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known.error(f"unknown argument {unknown[0]!r}")
    return args


def _check_flags(known: Parser, parser: Parser, argv: list[str]) -> None:
    """Names a mistyped flag before argparse complains of the required one that it was meant to be."""
    flags = [flag for flag in known._option_string_actions if flag.startswith("--")]
    for word in argv:
        flag = word.partition("=")[0]
        if flag == "--":
            return
        if flag.startswith("--") and flag not in flags and flag not in parser._option_string_actions:
            known.error(f"unknown flag {flag!r}{_near(flag, flags)}")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and the parser of each command by name."""
    parser = Parser(
        prog="qwen2-jax",
        description="Qwen2 models in JAX: look at, convert, train and talk to them.",
        epilog="`qwen2-jax COMMAND --help` tells more of one command. Results go to stdout, all else to stderr.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qwen2-jax {__version__}")
    parser.set_defaults(run=None)
    _add_general(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        importlib.import_module(f"qwen2_jax.cli.{name}").add_parser(commands)
    _add_general_below(parser)
    return parser, dict(commands.choices)


def _commands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """The parsers of a parser's (sub)commands by name; none below the last."""
    return {name: command for action in parser._actions if isinstance(action, argparse._SubParsersAction)
            for name, command in action.choices.items()}


def _add_general_below(parser: argparse.ArgumentParser) -> None:
    for command in _commands(parser).values():
        # Suppressed, so that the absence of a flag after the command does not undo its presence before it.
        _add_general(command, default=argparse.SUPPRESS)
        _add_general_below(command)


def _add_general(parser: argparse.ArgumentParser, *, default) -> None:
    general = parser.add_argument_group("general")
    general.add_argument("--debug", action="store_true", default=default,
                         help="show tracebacks, and what the libraries below log")
    general.add_argument("--no-compilation-cache", action="store_true", default=default,
                         help="compile anew: neither read nor write the cache of compiled programs")


def _near(word: str, known: list[str]) -> str:
    """`, did you mean --model?`, or a semicolon when nothing resembles `word`."""
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f", did you mean {' or '.join(matches)}?" if matches else ";"
