"""Gopher's heuristic filters (Rae et al. 2021, appendix A.1.1): what is measured of a text, and which limits it breaks.

Shape letter: W words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qwen2_jax.data.quality.rules import GopherRules
from qwen2_jax.data.quality.words import is_mostly_unspaced

BULLETS = ("•", "‣", "◦", "▪", "●", "*", "-", "–")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)
UNSPACED_CHARACTERS_A_WORD = 2      # about what a word has in Chinese and in Japanese
_PARAGRAPH = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Broken:
    """A rule that a text breaks, with what was measured and the limit."""

    rule: str
    value: float
    limit: float


def broken_rules(text: str, rules: GopherRules) -> list[Broken]:
    """Every rule that `text` breaks, in the order of the fields of `GopherRules`; runs of words have their length in
    the rule's name, like `max_top_2gram_characters`."""
    spaced = not is_mostly_unspaced(text)
    words = text.split()
    length = len(words) if spaced else sum(map(len, words)) / UNSPACED_CHARACTERS_A_WORD
    measured: list[tuple[str, float, float]] = [
        ("min_words", length, rules.min_words), ("max_words", length, rules.max_words),
        *(_of_words(text, words, rules) if spaced and words else ()),
        *_of_lines(text, rules),
        *(_of_ngrams(words, rules) if spaced else ()),
    ]
    return [Broken(name, round(value, 4), limit) for name, value, limit in measured
            if (value < limit if name.startswith("min_") else value > limit)]


def _of_words(text: str, words: list[str], rules: GopherRules) -> Iterator[tuple[str, float, float]]:
    mean = sum(map(len, words)) / len(words)
    yield "min_mean_word_length", mean, rules.min_mean_word_length
    yield "max_mean_word_length", mean, rules.max_mean_word_length
    yield "max_hashes", text.count("#") / len(words), rules.max_hashes
    yield "max_ellipses", (text.count("...") + text.count("…")) / len(words), rules.max_ellipses
    alphabetic = sum(any(map(str.isalpha, word)) for word in words)
    yield "min_alphabetic_words", alphabetic / len(words), rules.min_alphabetic_words
    if rules.min_stop_words:
        found = STOP_WORDS.intersection(word.strip(string.punctuation).lower() for word in words)
        yield "min_stop_words", len(found), rules.min_stop_words


def _of_lines(text: str, rules: GopherRules) -> Iterator[tuple[str, float, float]]:
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not lines:
        return
    yield "max_bullet_lines", sum(line.startswith(BULLETS) for line in lines) / len(lines), rules.max_bullet_lines
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    yield "max_ellipsis_lines", ellipses / len(lines), rules.max_ellipsis_lines
    paragraphs = [paragraph for paragraph in map(str.strip, _PARAGRAPH.split(text)) if paragraph]
    share, characters = _repeated(lines)
    yield "max_duplicate_lines", share, rules.max_duplicate_lines
    yield "max_duplicate_line_characters", characters, rules.max_duplicate_line_characters
    share, characters = _repeated(paragraphs)
    yield "max_duplicate_paragraphs", share, rules.max_duplicate_paragraphs
    yield "max_duplicate_paragraph_characters", characters, rules.max_duplicate_paragraph_characters


def _repeated(parts: list[str]) -> tuple[float, float]:
    """The share of `parts` that an earlier one equals, and the share of their characters."""
    different, characters = set(parts), sum(map(len, parts))
    return (len(parts) - len(different)) / len(parts), (characters - sum(map(len, different))) / characters


def _of_ngrams(words: list[str], rules: GopherRules) -> Iterator[tuple[str, float, float]]:
    numbers: dict[str, int] = {}
    word_W = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    characters_W = np.array([len(word) for word in words], np.int64)
    until_W = np.concatenate([[0], np.cumsum(characters_W)])
    ngram_W = word_W    # equal numbers where equal runs of n words begin; shorter by one with each n
    limits = dict(zip(TOP_NGRAMS + DUPLICATE_NGRAMS,
                      rules.max_top_ngram_characters + rules.max_duplicate_ngram_characters, strict=True))
    for n, limit in limits.items():
        if len(words) < n:
            return
        _, ngram_W, count = np.unique(ngram_W[:-1] * len(words) + word_W[n - 1 :],
                                      return_inverse=True, return_counts=True)
        count_W = count[ngram_W]
        if count_W.max() == 1:      # no run occurs twice, and so none of more words either
            return
        if n in TOP_NGRAMS:
            most = np.flatnonzero(count_W == count_W.max())
            longest = most[np.argmax(until_W[most + n] - until_W[most])]    # among equally frequent ones
            name, begins_W = f"max_top_{n}gram_characters", ngram_W == ngram_W[longest]
        else:
            name, begins_W = f"max_duplicate_{n}gram_characters", count_W > 1
        yield name, _covered(begins_W, n, characters_W) / int(until_W[-1]), limit


def _covered(begins_W: np.ndarray, n: int, characters_W: np.ndarray) -> int:
    """Characters in the runs of `n` words that begin where `begins_W` is true, those in several runs counted once."""
    starts, room = np.flatnonzero(begins_W), len(characters_W) + 1
    open_W = np.cumsum(np.bincount(starts, minlength=room) - np.bincount(starts + n, minlength=room))[:-1]
    return int(characters_W[open_W > 0].sum())
