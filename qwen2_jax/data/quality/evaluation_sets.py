"""The texts of evaluation sets: JSON lines, JSON, CSV and TSV, also compressed; which fields hold them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2_jax.data.decompress import SUFFIXES, blocks
from qwen2_jax.data.source_files import SourceFile, SourceOptions, find_files, opened
from qwen2_jax.errors import UserError

# What the common sets call their questions, then their answers; compared without case.
QUESTION_KEYS = ("question", "problem", "prompt", "query", "input", "text", "context", "content", "turns",
                 "instruction", "goal", "premise", "q")
ANSWER_KEYS = ("answer", "solution", "rationale", "explanation", "target", "code", "canonical_solution", "continuation",
               "reference", "choices", "options", "choice1", "choice2", "context_options", "best answer",
               "correct answers", "a")
ANY = "*"
_MOST_FIELD = 1 << 30   # characters of a field of CSV; Python's own limit is 128 KiB


@dataclass(frozen=True)
class EvaluationText:
    """One text of an evaluation set; `row` counts from 1 (of CSV, behind the header)."""

    text: str
    file: str
    row: int
    key: str

    @property
    def is_answer(self) -> bool:
        """Is it what an item asks for, or one of several such, rather than the question?"""
        return self.key.casefold() in ANSWER_KEYS


@dataclass
class EvaluationFile:
    """What was taken from one file."""

    path: str
    rows: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    """Texts by key."""


def read_evaluation_sets(paths: Sequence[str], keys: Sequence[str] = ()) -> tuple[list[EvaluationText],
                                                                                 list[EvaluationFile]]:
    """Every string of every row that stands under one of `keys` (`*` is any; default: QUESTION_KEYS and ANSWER_KEYS),
    at whatever depth: each is a text of its own, so that a question is found without its answer.

    Raises UserError for a file that cannot be read, is damaged, or has nothing under these keys.
    """
    wanted = {key.casefold() for key in keys or QUESTION_KEYS + ANSWER_KEYS}
    texts: list[EvaluationText] = []
    read: list[EvaluationFile] = []
    for file in find_files(paths, SourceOptions(format="text")):
        of_file = EvaluationFile(file.path)
        others: Counter[str] = Counter()
        for of_file.rows, row in enumerate(_rows(file), 1):
            for key, text in _strings(row, "", taken=False, wanted=wanted, others=others):
                if text.strip():
                    of_file.taken[key] += 1
                    texts.append(EvaluationText(text, file.path, of_file.rows, key))
        if not of_file.taken:
            there = ", ".join(repr(key) for key, _ in others.most_common(12))
            raise UserError(f"{file.path} has no text under {', '.join(map(repr, keys)) or 'the usual keys'}: "
                            f"name them with --eval-key ({f'there are {there}' if there else 'it has no text at all'})")
        read.append(of_file)
    return texts, read


def _strings(value: Any, key: str, *, taken: bool, wanted: set[str], others: Counter[str]) -> Iterator[tuple[str, str]]:
    """(key, string) of what stands under a wanted key; the keys of other strings are counted in `others`."""
    match value:
        case str() if taken or ANY in wanted:
            yield key, value
        case str():
            others[key] += 1
        case list():
            for item in value:
                yield from _strings(item, key, taken=taken, wanted=wanted, others=others)
        case dict():
            for name, item in value.items():
                under = taken or str(name).casefold() in wanted
                yield from _strings(item, key if taken else str(name), taken=under, wanted=wanted, others=others)


def _rows(file: SourceFile) -> Iterator[Any]:
    with opened(file) as stream:
        data = b"".join(blocks(stream, file.compression, file.path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.path} is no UTF-8 at byte {error.start}: convert it") from None
    name = file.path.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    match os.path.splitext(name)[1]:
        case ".csv" | ".tsv" as ending:
            csv.field_size_limit(_MOST_FIELD)
            try:
                yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="," if ending == ".csv" else "\t")
            except csv.Error as error:
                raise UserError(f"{file.path} is no table: {error}") from None
        case ".json":
            try:
                whole = json.loads(text)
            except ValueError:
                return (yield from _lines(text, file.path))
            yield from whole if isinstance(whole, list) else [whole]
        case ".jsonl" | ".ndjson":
            yield from _lines(text, file.path)
        case _:
            raise UserError(f"{file.path}: evaluation sets are read as .jsonl, .json, .csv or .tsv, each also .gz or "
                            ".zst; name or convert it so")


def _lines(text: str, path: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON: {error}") from None
