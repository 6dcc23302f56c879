"""Streams over tokens in memory, for several test files of this room; workers can import them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from qwen2_jax.data.mixture import Ramp
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.data.stream import Stream

T = 16


class MemorySource:
    """Documents as given, with the interface of `data.shards.TokenShards`; remembers what was read."""

    vocab, end_token = 10**9, 0

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


def numbered(lengths: Iterable[int], first: int = 0) -> Any:
    """Documents whose tokens tell document and place: (first + document) * 100,000 + place."""
    return MemorySource([np.arange(n) + 100_000 * (first + d) for d, n in enumerate(lengths)])


def mixed_lengths(documents: int, step: int = 1) -> np.ndarray:
    """Mostly shorter than a row, one in seventeen much longer."""
    numbers = np.arange(documents) * step
    return np.where(numbers % 17 == 0, 300, 1 + numbers * numbers * 37 % 31)


def make_stream(**changes) -> Stream:
    sources = {"web": numbered(mixed_lengths(300)), "code": numbered(mixed_lengths(100, 3), first=1000),
               "books": numbered([5000], first=2000)}
    arguments = {"row_length": T, "batch_size": 8, "seed": 0,
                 "weights": {"web": 0.6, "code": 0.3, "books": Ramp(((0, 0.0), (100, 0.2)))}} | changes
    return Stream(arguments.pop("sources", sources), **arguments)


def same_bytes(a: PackedBatch, b: PackedBatch) -> bool:
    arrays = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(PackedBatch)]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays)
