"""A source of tokens in memory with the interface of `data.shards.TokenShards`; workers can import it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

END = 0


class MemorySource:
    """Documents as given: tokens of each, the end token last."""

    end_token, vocab = END, 2**31 - 1

    def __init__(self, documents: Sequence[np.ndarray]):
        self.documents = list(documents)
        self.lengths = np.array([len(document) for document in self.documents], np.uint32)
        self.reads: list[tuple[int, int, int]] = []

    @property
    def manifest_hash(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        for document in self.documents:
            digest.update(document.astype(np.uint32).tobytes())
        return digest.hexdigest()

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        self.reads.append((document, start, stop))
        return self.documents[document][start:stop]


def numbered(lengths: Iterable[int], first: int = 0) -> MemorySource:
    """Documents whose tokens tell document and place: (first + document) * 100,000 + place."""
    return MemorySource([np.arange(n) + 100_000 * (first + d) for d, n in enumerate(lengths)])
