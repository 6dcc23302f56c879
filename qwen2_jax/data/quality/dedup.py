"""Deduplicates files, which are read twice: to find what repeats an earlier text, and to write what does not."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from qwen2_jax.data.quality.exact import SeenTexts, digest
from qwen2_jax.data.quality.minhash import Signer, near_duplicates
from qwen2_jax.data.quality.rules import MinHashRule
from qwen2_jax.data.quality.sift import Reason, Sieve, judged
from qwen2_jax.data.source_files import SourceFile, SourceOptions
from qwen2_jax.data.sources import BadRows

Marks = tuple[bytes, np.ndarray | None]
"""What a text is compared by: its digest, and its signature where near duplicates are looked for and it has words."""


class Duplicate(NamedTuple):
    """The document that stays instead of another, and how alike they are: None where they are equal."""

    of: int
    similarity: float | None


def deduplicate(files: Sequence[SourceFile], options: SourceOptions, sieve: Sieve, *, rule: MinHashRule | None,
                workers: int = 1, max_bad_rows: int = 0) -> None:
    """Puts the rows of `files` through `sieve`: of equal texts the first stays, with `rule` of near duplicates as well.

    Memory: 0.2 KB a document; with `rule` 1.2 KB at its default of 128 hashes. Raises UserError as `judged` does, and
    where `datasketch` is needed and not there.
    """
    compared = judged(files, options, partial(_start_marking, rule), workers=workers, title="compare",
                      bad=BadRows(max_bad_rows))
    duplicates = find_duplicates((row.verdict for row in compared if row.bad is None), rule)
    named = {duplicate.of for duplicate in duplicates.values()}
    places: dict[int, Reason] = {}
    number = 0
    for row in judged(files, options, _start_nothing, workers=1, title="write", bad=None):
        reason = None
        if row.bad is None:
            if number in named:
                places[number] = {"of_file": row.file, "of_row": row.row}
            if (duplicate := duplicates.get(number)) is not None:
                kind = {"reason": "exact_duplicate"} if duplicate.similarity is None else \
                    {"reason": "near_duplicate", "similarity": round(duplicate.similarity, 4)}
                reason = kind | places[duplicate.of]
            number += 1
        sieve.put(row, reason)


def find_duplicates(marks: Iterable[Marks], rule: MinHashRule | None) -> dict[int, Duplicate]:
    """Which documents go, by number; what each is a duplicate of stays, and comes before it."""
    seen, duplicates = SeenTexts(), dict[int, Duplicate]()
    signed, hashes = array("q"), array("I")     # documents with a signature, and these one after the other
    for number, (its_digest, signature) in enumerate(marks):
        if (first := seen.first(its_digest)) != number:
            duplicates[number] = Duplicate(first, None)
        elif signature is not None:
            signed.append(number)
            hashes.frombytes(signature.tobytes())
    if rule is not None:
        signatures_DP = np.frombuffer(hashes, np.uint32).reshape(-1, rule.permutations)
        near = {signed[n]: Duplicate(signed[of], similarity)
                for n, of, similarity in near_duplicates(signatures_DP, rule.threshold)}
        # A text equal to one that goes as a near duplicate goes for the same reason, as only what stays is named.
        duplicates = {n: near.get(equal.of, equal) for n, equal in duplicates.items()} | near
    return duplicates


def _start_marking(rule: MinHashRule | None) -> Callable[[str], Marks]:
    return partial(_mark, Signer(rule) if rule is not None else None)


def _mark(signer: Signer | None, text: str) -> Marks:
    return digest(text), signer(text) if signer is not None else None


def _start_nothing() -> Callable[[str], None]:
    return lambda text: None
