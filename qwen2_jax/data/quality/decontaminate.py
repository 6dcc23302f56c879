"""Takes what repeats evaluation texts out of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwen2_jax.data.quality.evaluation_sets import EvaluationFile, EvaluationText
from qwen2_jax.data.quality.overlap import EvaluationTexts, Repeated
from qwen2_jax.data.quality.rules import Overlap
from qwen2_jax.data.quality.sift import Sieve, judged
from qwen2_jax.data.quality.words import Words
from qwen2_jax.data.source_files import SourceFile, SourceOptions
from qwen2_jax.data.sources import BadRows
from qwen2_jax.data.tokenizer import Tokenizer

Found = tuple[Repeated | None, str, list[int]]
"""What a text repeats, the shared run as a person reads it, and the evaluation texts that share a run."""


def decontaminate(files: Sequence[SourceFile], options: SourceOptions, sieve: Sieve, *,
                  evaluation: Sequence[EvaluationText], overlap: Overlap, tokenizer: Path | None = None,
                  workers: int = 1, max_bad_rows: int = 0) -> set[int]:
    """Puts the rows of `files` through `sieve`: those that repeat an `evaluation` text by `overlap` go. With
    `tokenizer`, a folder, lengths and runs are in its tokens instead of words.

    Returns the numbers of the evaluation texts with a run of words that also is in `files`, whether or not anything
    goes for it: the Qwen2 report's strict measure of contamination (section 5.2.6, table 15). Raises UserError as
    `judged` does.
    """
    start = partial(_start, [one.text for one in evaluation], [not one.is_answer for one in evaluation], overlap,
                    tokenizer)
    touched: set[int] = set()
    for row in judged(files, options, start, workers=workers, title="decontaminate", bad=BadRows(max_bad_rows)):
        repeated, shared, sharing = row.verdict if row.bad is None else (None, "", ())
        touched.update(sharing)
        reason = None
        if repeated is not None:
            text = evaluation[repeated.evaluation]
            reason = {"reason": "equals_evaluation_question" if repeated.exact else "overlaps_evaluation_text",
                      "evaluation_file": text.file, "evaluation_row": text.row, "evaluation_key": text.key,
                      "lcs": repeated.lcs, "words": repeated.training_words,
                      "evaluation_words": repeated.evaluation_words, "shared": shared}
        sieve.put(row, reason)
    return touched


def contamination(touched: Iterable[int], evaluation: Sequence[EvaluationText], read: Sequence[EvaluationFile],
                  overlap: Overlap) -> list[str]:
    """A line for each evaluation file: its keys, and how many of its rows share a run with the documents."""
    rows = Counter(file for file, _ in {(evaluation[n].file, evaluation[n].row) for n in touched})
    return [f"{file.path}: {rows[file.path]:,} of {file.rows:,} rows share a run of {overlap.ngram} with a document "
            f"(compared: {', '.join(file.taken)})" for file in read]


def _start(texts: Sequence[str], questions: Sequence[bool], overlap: Overlap, tokenizer: Path | None
           ) -> Callable[[str], Found]:
    words = Words(overlap.keep_case, overlap.symbols)
    if tokenizer is None:
        return partial(_find, EvaluationTexts(texts, overlap, words, questions.__getitem__), " ".join)
    tokens = Tokenizer.load(tokenizer)
    split = partial(_tokens, words, tokens)
    return partial(_find, EvaluationTexts(texts, overlap, split, questions.__getitem__), tokens.decode)


def _find(evaluation: EvaluationTexts, shown: Callable[[Any], str], text: str) -> Found:
    repeated, sharing = evaluation.find(text)
    return repeated, shown(repeated.shared) if repeated is not None else "", sharing


def _tokens(words: Words, tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(words.joined(text), special=False)
