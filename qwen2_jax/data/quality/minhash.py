"""Near duplicates by MinHash (Broder 1997): which texts share most of their shingles, runs of a few words.

Shape letters: D documents, P permutations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from qwen2_jax.data.quality.rules import MinHashRule
from qwen2_jax.data.quality.words import Words
from qwen2_jax.errors import UserError

RECALL = 0.99           # of the pairs exactly at the threshold, how many the bands bring together
_SHINGLES_AT_ONCE = 4096    # a long text's table of shingles by permutations must not fill the memory
_ODD = 0x9E3779B97F4A7C15   # 2^64 over the golden ratio: its powers spread hashes over 64 bits
_words = Words()


class Signer:
    """Makes signatures by `datasketch`. Equal rules make equal signatures in every process and on every machine.

    Raises UserError where `datasketch` is not installed.
    """

    def __init__(self, rule: MinHashRule):
        self.rule = rule
        self._empty = _minhash(rule)

    def __call__(self, text: str) -> np.ndarray | None:
        """The signature of `text`, uint32 [P]; None for a text without a word, which is like no other.

        A text of fewer words than a shingle has is one shingle.
        """
        words, n = _words(text), self.rule.shingle
        if not words:
            return None
        shingles = [" ".join(words[i : i + n]).encode() for i in range(max(1, len(words) - n + 1))]
        sketch = self._empty.copy()
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            sketch.update_batch(shingles[start : start + _SHINGLES_AT_ONCE])
        return sketch.hashvalues


def _minhash(rule: MinHashRule):
    try:
        from datasketch import MinHash
    except ModuleNotFoundError as error:
        raise UserError('near duplicates are found with datasketch, which is not installed: pip install '
                        '"qwen2_jax[data]", or keep to exact duplicates') from error
    return MinHash(num_perm=rule.permutations, seed=rule.seed, scheme="affine32")


def near_duplicates(signatures_DP: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
    """(document, the earlier one that it is like, share of equal hashes), documents in ascending order.

    The first stays: a document goes when a document that stays, and comes before it, is equal in at least `threshold`
    of its P hashes; among several the most alike is named, and the first of those. Pairs are looked for where a band
    of hashes is equal, bands so narrow that of pairs at the threshold itself RECALL are seen, of more similar ones
    nearly all. Takes 4 bytes a document and band beside the signatures.
    """
    documents, permutations = signatures_DP.shape
    needed = _needed(threshold, permutations)
    rows = band_rows(threshold, permutations)
    groups_BD = [_groups(signatures_DP[:, start : start + rows])
                 for start in range(0, permutations - rows + 1, rows)]
    shares = np.zeros(documents, bool)      # a band with some other document
    for groups_D in groups_BD:
        shares |= groups_D >= 0
    staying: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in groups_BD]
    for document in np.flatnonzero(shares).tolist():
        mine = [(of_group, int(groups_D[document])) for of_group, groups_D in zip(staying, groups_BD, strict=True)
                if groups_D[document] >= 0]
        like = np.array(sorted({other for of_group, group in mine for other in of_group.get(group, ())}), np.int64)
        if like.size:
            equal = np.count_nonzero(signatures_DP[like] == signatures_DP[document], axis=1)
            best = int(np.argmax(equal))
            if equal[best] >= needed:
                yield document, int(like[best]), int(equal[best]) / permutations
                continue
        for of_group, group in mine:
            of_group[group].append(document)


def _needed(threshold: float, permutations: int) -> int:
    """The least number of equal hashes that is a share of at least `threshold`, without the error of 0.8 * 5."""
    return next(n for n in range(permutations + 1) if n / permutations >= threshold)


def band_rows(threshold: float, permutations: int) -> int:
    """Hashes in a band: as many as leave the chance that a pair at `threshold` shares a band at RECALL or above.

    A band of r hashes is equal with probability s^r; one of b bands is with 1 - (1 - s^r)^b.
    """
    return max((r for r in range(1, permutations + 1)
                if 1 - (1 - threshold**r) ** (permutations // r) >= RECALL), default=1)


def _groups(band_DR: np.ndarray) -> np.ndarray:
    """A number for each document, int32 [D], equal where the rows of `band_DR` are equal; -1 where no other's is.

    Rows are told apart by 64 bits: two that are taken for equal once in a blue moon are compared like any others.
    """
    factors_R = np.array([pow(_ODD, k, 2**64) for k in range(band_DR.shape[1])], np.uint64)
    _, group_D, size = np.unique(band_DR.astype(np.uint64) @ factors_R, return_inverse=True, return_counts=True)
    return np.where(size[group_D] > 1, group_D, -1).astype(np.int32)
