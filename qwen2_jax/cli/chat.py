"""`qwen2-jax chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import io
import sys

from qwen2_jax.cli.model_flags import add_model_flags, add_sampling_flags, load_model, sampling_settings, tell
from qwen2_jax.errors import UserError

DESCRIPTION = """\
Talks to a model, line by line; its answers appear as they are made. /reset forgets the conversation, /exit or Ctrl-D
ends it. Ctrl-C ends an answer, and the program where there is none.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("chat", help="talk to a model", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the model's own)")
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = sampling_settings(args)
    lm = load_model(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    lm.chat_ids([*opening, {"role": "user", "content": "?"}])  # a model without a tokenizer is refused here, not later
    if sys.stdin.isatty():
        tell("/reset forgets the conversation, /exit or Ctrl-D ends it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    messages = list(opening)
    while (line := _ask()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
        elif line.strip():
            messages = _answer(lm, messages, line, settings)
    return 0


def _ask() -> str | None:
    """The next line of the user, without its line end; None at the end of input."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True, file=sys.stderr)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _answer(lm, messages: list[dict], line: str, settings: dict) -> list[dict]:
    """The conversation with the user's line and the model's answer, which is streamed to stdout."""
    asked = [*messages, {"role": "user", "content": line}]
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.append(text)
        print(text, end="", flush=True)

    try:
        lm.fit_prompt(lm.chat_ids(asked), settings["max_new_tokens"], settings["truncate"], "the conversation")
        lm.chat(asked, on_text=hear, **settings)
    except UserError as error:
        tell(f"{error} (/reset starts a new conversation)")
        return messages
    except KeyboardInterrupt:
        if not heard:
            raise
    print(flush=True)
    return [*asked, {"role": "assistant", "content": "".join(heard)}]
