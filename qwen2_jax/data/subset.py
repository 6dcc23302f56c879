"""Part of a source's documents as a source of its own."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np


class Subset:
    """Of each 1 / `share` documents in a row the last (`held_out`), or the others."""

    def __init__(self, source: Any, share: float, *, held_out: bool):
        self.source, self.share, self.held_out = source, share, held_out
        self.vocab, self.end_token = source.vocab, source.end_token

    @cached_property
    def documents(self) -> np.ndarray:
        """Their numbers in the whole source, int64."""
        taken = np.floor(np.arange(len(self.source.lengths) + 1) * self.share)
        return np.flatnonzero((np.diff(taken) > 0) == self.held_out)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.source.lengths[self.documents]

    @property
    def manifest_hash(self) -> str:
        rule = f"{self.source.manifest_hash} {self.share!r} {self.held_out}"
        return hashlib.sha256(rule.encode()).hexdigest()

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.source.tokens(int(self.documents[document]), start, stop)

    def __reduce__(self):
        return _subset, (self.source, self.share, self.held_out)


def _subset(source: Any, share: float, held_out: bool) -> Subset:
    return Subset(source, share, held_out=held_out)
