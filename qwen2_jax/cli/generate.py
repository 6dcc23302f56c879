"""`qwen2-jax generate`: continue prompts from the command line or a file."""

from __future__ import annotations

import argparse
import codecs
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwen2_jax.cli.model_flags import add_model_flags, add_sampling_flags, join_processes, load_model, sampling_settings
from qwen2_jax.cli.output import records
from qwen2_jax.errors import UserError

DESCRIPTION = """\
Continues prompts. Each line of FILE is a JSON object with `prompt` (text) or `messages` (a conversation), and an `id`
that is passed through; results are JSON lines too. A line that cannot be used gives an object with `error`; the others
are done, and the exit status is 2.
"""

DEEPEST = 100


@dataclass
class Record:
    """One input: what goes into its output object, and its prompt's token ids or why it has none."""

    echo: dict[str, Any]
    ids: list[int] | None = None
    error: str | None = None


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("generate", help="continue prompts", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (may be repeated)")
    parser.add_argument("--input", metavar="FILE", help="JSON lines with prompt or messages; - is stdin")
    parser.add_argument("--output", metavar="FILE", help="JSON lines with the results (default: stdout)")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message; answer it")
    parser.add_argument("--json", action="store_true", help="print one JSON object a result, in order")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples a prompt (default: 1)")
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.input is None):
        raise UserError("give either --prompt or --input")
    inputs = [{"prompt": prompt} for prompt in args.prompt] if args.input is None else _read(args.input)
    as_json = args.json or args.input is not None or args.output is not None
    settings = sampling_settings(args)
    speaks = join_processes(args)
    with records(args.output if speaks else os.devnull) as out:
        lm = load_model(args)
        prepared = [_prepare(lm, item, args) for item in inputs]
        if args.input is None and (wrong := [r.error for r in prepared if r.error]):
            raise UserError(wrong[0])
        _generate(lm, prepared, out, as_json, settings)
    return 2 if any(record.error for record in prepared) else 0


def _read(path: str) -> list[Any]:
    """Input objects; a line that is no JSON object becomes the UserError that says so."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    items: list[Any] = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_checked(json.loads(line.decode(), parse_float=_finite, parse_constant=_finite), number))
        except json.JSONDecodeError as error:
            items.append(UserError(f"line {number} is not JSON: {error.msg} at column {error.colno}"))
        except (ValueError, RecursionError) as error:
            items.append(UserError(f"line {number} is not JSON: {error}"))
    if not items:
        raise UserError(f"{path} holds no input: one JSON object a line is needed")
    return items


def _checked(item: Any, number: int) -> Any:
    if not isinstance(item, dict):
        return UserError(f"line {number} is not a JSON object")
    depth, level = 0, [item]
    while level:
        depth, level = depth + 1, [inner for outer in level for inner in _inside(outer)]
    # What is read here is written again later, with less of Python's stack left.
    return item if depth <= DEEPEST else UserError(f"line {number} is nested more than {DEEPEST} levels deep")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    """A number that the output can hold as well: Python reads NaN and 1e999, JSON has neither."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _prepare(lm, item: Any, args: argparse.Namespace) -> Record:
    if isinstance(item, UserError):
        return Record({}, error=str(item))
    record = Record({name: item[name] for name in ("id", "prompt", "messages") if name in item})
    try:
        if ("prompt" in item) == ("messages" in item):
            raise UserError("needs either `prompt` or `messages`")
        if "messages" in item:
            ids = lm.chat_ids(item["messages"])
        elif not isinstance(item["prompt"], str):
            raise UserError(f"`prompt` must be text, found {type(item['prompt']).__name__}")
        else:
            ids = lm.prompt_ids(item["prompt"])  # also refuses an empty user message
            if args.chat:
                ids = lm.chat_ids([{"role": "user", "content": item["prompt"]}])
        record.ids = lm.fit_prompt(ids, args.max_new_tokens, args.truncate)[0]
    except UserError as error:
        record.error = str(error)
    return record


def _generate(lm, prepared: list[Record], out: IO[str], as_json: bool, settings: dict[str, Any]) -> None:
    """Generate all records that have a prompt; results go out in order, each as soon as those before it are there."""
    from tqdm import tqdm

    samples = settings["n"]
    usable = [i for i, record in enumerate(prepared) if record.ids is not None]
    done: list[list[str] | None] = [None if r.error is None else [_line(r, None, as_json)] for r in prepared]
    parts: dict[int, dict[int, str]] = {i: {} for i in usable}
    written = 0

    def write(upto_gap: bool) -> None:
        nonlocal written
        while written < len(done) and (done[written] is not None or not upto_gap):
            out.writelines(done[written] or [])
            written += 1
        out.flush()

    def finished(index: int, generation) -> None:
        i, sample = usable[index // samples], index % samples
        parts[i][sample] = _line(prepared[i], generation, as_json)
        if len(parts[i]) == samples:
            done[i] = [parts[i][k] for k in range(samples)]
            write(upto_gap=True)
        bar.update()

    with tqdm(total=len(usable) * samples, unit="sample", disable=None if len(usable) * samples > 1 else True) as bar:
        try:
            lm.generate([prepared[i].ids for i in usable], on_done=finished, **settings)
        finally:    # interrupted: what is finished behind a gap counts too, and each sample of a prompt
            for i in usable:
                done[i] = [line for _, line in sorted(parts[i].items())]
            write(upto_gap=False)


def _line(record: Record, generation, as_json: bool) -> str:
    if not as_json:
        return f"{generation.text}\n"
    if generation is None:
        result = {"error": record.error}
    else:
        result = {"text": generation.text, "token_ids": generation.token_ids, "finish_reason": generation.finish_reason,
                  "prompt_tokens": generation.prompt_tokens}
    line = json.dumps(record.echo | result, ensure_ascii=False)
    # A lone surrogate has no UTF-8; written as \ud800 it is JSON again.
    return line.encode("utf-8", "backslashreplace").decode() + "\n"
