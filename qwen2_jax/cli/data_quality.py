"""`qwen2-jax data dedup|filter|decontaminate SRC… --out FILE`: training text without what should not be in it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.cli.output import whole_file
from qwen2_jax.cli.source_flags import add_source_flags, source_options
from qwen2_jax.errors import UserError
from qwen2_jax.settings import settings, with_settings

if TYPE_CHECKING:
    from qwen2_jax.data.quality.sift import Sieve

WRITTEN = """\
Rows that stay go to FILE, a .jsonl, in their order: lines of JSON as they were found; of other formats the text alone.
Beside it FILE's name with .removed.jsonl gets a line for each row that goes: where it stood, the reason, and what was
measured. Both appear complete or not at all. A row without a document counts against --max-bad-rows.
"""
DEDUP = f"""\
Removes documents that repeat an earlier one: equal texts, and near duplicates by MinHash. The first stays.

{WRITTEN}
The sources are read twice. Memory: 1.2 KB a document, 0.2 KB with --exact.
"""
FILTER = f"""\
Removes documents in other languages (--languages), and those that break one of Gopher's heuristic rules.

{WRITTEN}
The rules were made for English web pages. Where no spaces stand between words (Chinese, Japanese, Thai, Lao, Burmese,
Khmer) those on words and runs of words are not applied, and two characters count as a word of the length. Code and
tables want other limits. Each rule is a setting; --no-heuristics applies none.
"""
DECONTAMINATE = f"""\
Removes documents that repeat a text of an evaluation set: that share a run of 13 words with it, and have with it a long
enough longest common subsequence (LCS). Words are compared without case, punctuation and symbols.

  qwen2       |LCS| is at least 13 words and at least 0.6 of the shorter text (Qwen2 report, 5.2.6)
  qwen2_math  |LCS| is more than 0.6 of the shorter text (strict); or the document equals a question (exact_words=3)

The reports do not say what they count. Here it is words; where no spaces stand between words each character is one, and
13 of them are a short phrase: more goes than of English. --tokenizer counts a tokenizer's tokens instead.

{WRITTEN}
Each text under one of the keys of an evaluation set is a text of its own, so that a question is found without its
answer. Memory: 0.1 KB for each word of the evaluation sets in each worker.
"""


def add_parser(subparsers) -> None:
    from qwen2_jax.data.quality.rules import OVERLAP_RULES, GopherRules, MinHashRule

    parser = _parser(subparsers, "dedup", "remove documents that repeat an earlier one", DEDUP, MinHashRule())
    parser.add_argument("--exact", action="store_true", help="remove equal texts only, no near duplicates")
    parser.set_defaults(run=_run_dedup)

    parser = _parser(subparsers, "filter", "remove documents by language and heuristic rules", FILTER, GopherRules())
    parser.add_argument("--languages", metavar="CODES",
                        help="languages that stay, as ISO 639 codes like en,zh (default: all)")
    parser.add_argument("--min-confidence", type=float, default=0.5, metavar="P",
                        help="how sure the language must be, from 0 to 1 (default: 0.5)")
    parser.add_argument("--no-heuristics", action="store_true", help="go by the language alone")
    parser.set_defaults(run=_run_filter)

    parser = _parser(subparsers, "decontaminate", "remove documents that repeat evaluation sets", DECONTAMINATE,
                     OVERLAP_RULES["qwen2"])
    parser.add_argument("--eval", nargs="+", required=True, metavar="FILE", dest="evaluation",
                        help="evaluation sets: .jsonl, .json, .csv or .tsv, also .gz or .zst")
    parser.add_argument("--eval-key", action="append", default=[], metavar="KEY", dest="keys",
                        help="key of evaluation texts, may be repeated; '*' is any (default: question, answer, and "
                             "what the common sets call theirs)")
    parser.add_argument("--rule", choices=tuple(OVERLAP_RULES), default="qwen2",
                        help="when a document goes, see above (default: qwen2)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR",
                        help="count in this tokenizer's tokens instead of words")
    parser.set_defaults(run=_run_decontaminate)


def _parser(subparsers, name: str, help: str, description: str, rules: Any) -> argparse.ArgumentParser:
    known = "\n".join(f"  {setting.name}={_text(setting.value)}\n      {setting.help}" for setting in settings(rules))
    parser = subparsers.add_parser(name, help=help, description=description, epilog=f"settings:\n{known}",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    parser.add_argument("--out", required=True, metavar="FILE", type=Path, help="the .jsonl to write")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="assignments",
                        help="change a setting (may be repeated); they are listed below")
    return parser


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _run_dedup(args: argparse.Namespace) -> int:
    from qwen2_jax.data.quality.dedup import deduplicate
    from qwen2_jax.data.quality.rules import MinHashRule

    rule = with_settings(MinHashRule(), args.assignments)
    with _sieve(args) as (sieve, given):
        deduplicate(**given, sieve=sieve, rule=None if args.exact else rule)
    return _report(sieve)


def _run_filter(args: argparse.Namespace) -> int:
    from qwen2_jax.data.quality.filter import Languages, filter_documents
    from qwen2_jax.data.quality.rules import GopherRules

    rules = with_settings(GopherRules(), args.assignments)
    wanted = [code.strip().lower() for code in (args.languages or "").split(",") if code.strip()]
    if not wanted and args.no_heuristics:
        raise UserError("nothing to filter by: name --languages or leave --no-heuristics out")
    with _sieve(args) as (sieve, given):
        filter_documents(**given, sieve=sieve, languages=Languages(wanted, args.min_confidence) if wanted else None,
                         rules=None if args.no_heuristics else rules)
    return _report(sieve)


def _run_decontaminate(args: argparse.Namespace) -> int:
    from qwen2_jax.data.quality.decontaminate import contamination, decontaminate
    from qwen2_jax.data.quality.evaluation_sets import read_evaluation_sets
    from qwen2_jax.data.quality.rules import OVERLAP_RULES

    overlap = with_settings(OVERLAP_RULES[args.rule], args.assignments)
    evaluation, read = read_evaluation_sets(args.evaluation, args.keys)
    with _sieve(args) as (sieve, given):
        touched = decontaminate(**given, sieve=sieve, evaluation=evaluation, overlap=overlap, tokenizer=args.tokenizer)
    return _report(sieve, *contamination(touched, evaluation, read, overlap))


@contextmanager
def _sieve(args: argparse.Namespace) -> Iterator[tuple[Sieve, dict[str, Any]]]:
    """The files to write, and what all three functions are given."""
    from qwen2_jax.data.quality.sift import Sieve
    from qwen2_jax.data.source_files import find_files

    out: Path = args.out
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}: rows are written as plain lines of JSON, name a file that ends with .jsonl")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}: it must be at least 1")
    removed = out.with_suffix(".removed.jsonl")
    options = source_options(args)
    files = find_files(args.sources, options)
    for file in files:
        if os.path.realpath(file.path) in map(os.path.realpath, (out, removed)):
            raise UserError(f"{file.path} is to be read and to be written: name another --out")
    with whole_file(out, "wb") as kept_lines, whole_file(removed) as removed_lines:
        yield Sieve(kept_lines, removed_lines), {
            "files": files, "options": options, "max_bad_rows": args.max_bad_rows,
            "workers": args.workers or len(os.sched_getaffinity(0))}


def _report(sieve: Sieve, *lines: str) -> int:
    for line in (sieve.summary(), *lines):
        print(line, file=sys.stderr)
    return 0
