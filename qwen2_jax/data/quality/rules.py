"""What is thrown out of training text, as settings: the fields of these dataclasses are what a user can change."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from qwen2_jax.errors import UserError


@dataclass(frozen=True)
class MinHashRule:
    """When two texts are near duplicates: when `threshold` of their minimal hashes are equal. That share estimates the
    Jaccard similarity of their sets of shingles with a standard error of 0.035 at these settings and threshold.

    The Qwen2 report names no settings; these are the project's own.
    """

    threshold: float = 0.8
    """Jaccard similarity from which a text is a near duplicate."""
    shingle: int = 5
    """Words in a shingle, the runs of words that a text is compared by."""
    permutations: int = 128
    """Minimal hashes a text, of 4 bytes each: more estimate the similarity better."""
    seed: int = 1
    """Seed of the permutations."""

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise _refused(self, "threshold", "above 0 and at most 1")
        for name in ("shingle", "permutations"):
            if getattr(self, name) < 1:
                raise _refused(self, name, "at least 1")
        if not 0 <= self.seed < 2**32:
            raise _refused(self, "seed", "from 0 to 2^32 - 1")


@dataclass(frozen=True)
class GopherRules:
    """Heuristic filters and limits of Gopher's training text (Rae et al. 2021, appendix A.1.1 and table A1).

    They were made for English web pages. Other text wants other limits: code breaks the rules on symbols and lines,
    agglutinating languages the mean word length. Where words are not separated by spaces (Chinese, Japanese, Thai, …)
    the rules on words and on runs of words are not applied, and two characters count as a word of the length.
    """

    min_words: int = 50
    """Fewest words of a document."""
    max_words: int = 100_000
    """Most words of a document."""
    min_mean_word_length: float = 3.0
    """Least mean number of characters of a word."""
    max_mean_word_length: float = 10.0
    """Largest mean number of characters of a word."""
    max_hashes: float = 0.1
    """Most hash signs (#) a word."""
    max_ellipses: float = 0.1
    """Most ellipses (... or …) a word."""
    max_bullet_lines: float = 0.9
    """Largest share of lines that begin with a bullet point."""
    max_ellipsis_lines: float = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Least share of words with at least one letter."""
    min_stop_words: int = 0
    """Fewest different words of the, be, to, of, and, that, have, with. Gopher asks for 2; English only, so 0 here."""
    max_duplicate_lines: float = 0.3
    """Largest share of lines that stood there before."""
    max_duplicate_line_characters: float = 0.2
    """Largest share of characters in lines that stood there before."""
    max_duplicate_paragraphs: float = 0.3
    """Largest share of paragraphs (between empty lines) that stood there before."""
    max_duplicate_paragraph_characters: float = 0.2
    """Largest share of characters in paragraphs that stood there before."""
    max_top_ngram_characters: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Largest shares of characters in the most frequent run of 2, 3, 4 words."""
    max_duplicate_ngram_characters: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """Largest shares of characters in runs of 5, 6, 7, 8, 9, 10 words that occur more than once."""

    def __post_init__(self):
        for name, many in (("max_top_ngram_characters", 3), ("max_duplicate_ngram_characters", 6)):
            if len(getattr(self, name)) != many:
                raise _refused(self, name, f"{many} numbers")


@dataclass(frozen=True)
class Overlap:
    """When a training text repeats an evaluation text. Lengths are in words; |LCS| is the length of the longest common
    subsequence, which may have gaps.

    A training text goes when it shares a run of `ngram` words with an evaluation text, and |LCS| is at least `min_lcs`
    and a large enough share of the length that `lcs_of` names: at least `lcs_ratio` of it (`qwen2`), or more than that
    (`strict`, `qwen2_math`). With `exact_words` it also goes when it equals the question of an evaluation item.
    """

    ngram: int = 13
    """Words of a run that must be in both."""
    min_lcs: int = 13
    """Least |LCS|."""
    lcs_ratio: float = 0.6
    """Least share that |LCS| must be."""
    lcs_of: Literal["shorter", "evaluation", "training"] = "shorter"
    """Length of which |LCS| must be that share: of the shorter text (Qwen2's; Qwen2-Math's is not published), of the
    evaluation text or of the training text."""
    strict: bool = False
    """Must |LCS| be more than that share, not only reach it?"""
    exact_words: int | None = None
    """Fewest words of a question that a text equal to it goes for, whatever else is asked; none: it does not."""
    keep_case: bool = False
    """Are upper and lower case different? (Not published.)"""
    symbols: Literal["space", "delete"] = "space"
    """What takes the place of punctuation and symbols, which do not count: with space 3+4 is three words as 3 + 4 is,
    with delete one. (Not published.)"""

    def __post_init__(self):
        for name in ("ngram", "min_lcs"):
            if getattr(self, name) < 1:
                raise _refused(self, name, "at least 1")
        if self.exact_words is not None and self.exact_words < 1:
            raise _refused(self, "exact_words", "at least 1, or none")
        if not 0 <= self.lcs_ratio <= 1:
            raise _refused(self, "lcs_ratio", "from 0 to 1")

    def needed_lcs(self, training: int, evaluation: int) -> int:
        """The least |LCS| at which a training text of `training` words goes."""
        whole = {"shorter": min(training, evaluation), "evaluation": evaluation, "training": training}[self.lcs_of]
        share = Fraction(str(self.lcs_ratio)) * whole   # exact: 0.6 * 55 is 33, not 33.000000000000004
        return max(self.min_lcs, int(share) + 1 if self.strict else -int(-share // 1))


# Qwen2's report, section 5.2.6; Qwen2-Math: exact match, and 13-grams with a ratio above 0.6. From three words on, as
# shorter "questions" are such as XCOPA's "cause", which any heading equals; "Compute arcsin 1" is one of MATH's.
OVERLAP_RULES = {"qwen2": Overlap(), "qwen2_math": Overlap(strict=True, exact_words=3)}


def _refused(settings: Any, name: str, needed: str) -> UserError:
    return UserError(f"{name} is {getattr(settings, name)}: it must be {needed}")
