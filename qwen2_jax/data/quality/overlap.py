"""Which training texts repeat an evaluation text: a shared run of words, then the longest common subsequence.

The run of words alone finds too much, since formulas and phrases recur; the longest common subsequence alone would have
to be computed for every pair. So runs are looked up in a sorted table, and only those evaluation texts that share one
are compared whole.

Shape letters: W words of a text, G runs of words of all evaluation texts, U different runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qwen2_jax.data.quality.lcs import lcs_length
from qwen2_jax.data.quality.rules import Overlap

_ODD = 0x9E3779B97F4A7C15   # 2^64 over the golden ratio: hashes runs of word numbers into 64 bits, polynomially


@dataclass(frozen=True)
class Repeated:
    """An evaluation text that a training text repeats. Lengths are in words."""

    evaluation: int
    """Number of the evaluation text."""
    exact: bool
    """Are both equal? Then there need not be a shared run."""
    lcs: int
    training_words: int
    evaluation_words: int
    shared: tuple[Hashable, ...]
    """The first run of words that is in both; all words where both are equal."""


class EvaluationTexts:
    """Finds the evaluation texts that a training text repeats.

    Memory: 40 bytes for each word of the evaluation texts, twice that while it is made, and about 0.2 KB for each
    different word.
    """

    def __init__(self, texts: Iterable[str], overlap: Overlap, split: Callable[[str], Sequence[Hashable]],
                 whole: Callable[[int], bool] = lambda number: True):
        """`split` makes the words of a text: `words.Words`, or a tokenizer's tokens. `whole` tells by a text's number
        whether it stands for its item, so that being equal to it is enough where the rule says so."""
        self._overlap, self._split = overlap, split
        self._number: dict[Hashable, int] = {}      # from 1; 0 is a word that no evaluation text has
        self._equal: dict[bytes, int] = {}
        words, begins = array("i"), [0]     # all texts, each with a 0 behind it, over which no run reaches
        for number, text in enumerate(texts):
            words.extend(self._number.setdefault(word, len(self._number) + 1) for word in split(text))
            least = overlap.exact_words
            if least is not None and len(words) - begins[-1] >= max(least, 1) and whole(number):
                self._equal.setdefault(words[begins[-1] :].tobytes(), number)
            words.append(0)
            begins.append(len(words))
        word_W = np.frombuffer(words, np.int32)
        self._texts = [word_W[begin : end - 1] for begin, end in pairwise(begins)]
        run_G, at_G = self._runs(word_W)
        text_G = np.searchsorted(begins, at_G, side="right").astype(np.int32) - np.int32(1)
        order_G = np.lexsort((text_G, run_G))
        run_G, text_G = run_G[order_G], text_G[order_G]
        first_G = np.append(True, (run_G[1:] != run_G[:-1]) | (text_G[1:] != text_G[:-1]))[: len(run_G)]
        run_G, self._text_G = run_G[first_G], text_G[first_G]
        self._run_U, self._begins_U = np.unique(run_G, return_index=True)
        self._ends_U = np.append(self._begins_U[1:], len(run_G))

    def find(self, text: str) -> tuple[Repeated | None, list[int]]:
        """The evaluation text that `text` repeats by the rule, if any, and the numbers of all that share a run with it.

        Among several it is the one that shares most runs, and the first of those.
        """
        words = self._split(text)
        word_W = np.array([self._number.get(word, 0) for word in words], np.int32)
        run_W, at_W = self._runs(word_W)
        sharing, runs = self._sharing(run_W)
        if (same := self._equal.get(word_W.tobytes())) is not None:
            return Repeated(same, True, len(words), len(words), len(words), tuple(words)), sharing.tolist()
        for number in sharing[np.argsort(-runs, kind="stable")].tolist():
            its_W = self._texts[number]
            needed = self._overlap.needed_lcs(len(words), len(its_W))
            common = word_W[np.isin(word_W, its_W)].tolist()
            if len(common) >= needed and (lcs := lcs_length(common, its_W.tolist())) >= needed:
                first = int(at_W[np.isin(run_W, self._runs(its_W)[0])][0])
                shared = tuple(words[first : first + self._overlap.ngram])
                return Repeated(number, False, lcs, len(words), len(its_W), shared), sharing.tolist()
        return None, sharing.tolist()

    def _sharing(self, run_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the evaluation texts with one of these runs, ascending, and how many different ones each has."""
        if not len(self._run_U):
            run_W = run_W[:0]
        place_W = np.minimum(np.searchsorted(self._run_U, run_W), len(self._run_U) - 1)
        shared_U = np.unique(place_W[self._run_U[place_W] == run_W])
        texts = [self._text_G[self._begins_U[u] : self._ends_U[u]] for u in shared_U]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *texts]), return_counts=True)

    def _runs(self, word_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the runs of words that evaluation texts have, uint64, and where each begins.

        Two runs with equal hashes are one in 2^64; the texts would then be compared, and be found different.
        """
        count = len(word_W) - self._overlap.ngram + 1
        if count < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        wide_W = word_W.astype(np.uint64)
        run_W = np.zeros(count, np.uint64)
        for k in range(self._overlap.ngram):
            run_W = run_W * np.uint64(_ODD) + wide_W[k : k + count]
        unknown_W = np.concatenate([[0], np.cumsum(word_W == 0)])
        at_W = np.flatnonzero(unknown_W[self._overlap.ngram :] == unknown_W[:count])
        return run_W[at_W], at_W
