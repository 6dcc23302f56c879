"""Draws that are functions of a key alone: the same on every machine and with every version of NumPy.

(What the methods of `numpy.random.Generator` give may change from one version to the next, says NumPy's NEP 19; the
order of a training run's data must not.)
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it, modulo 2^64, are spread more evenly than random numbers."""


def key_state(*key: str | int) -> int:
    """64 bits that stand for a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def splitmix64(state: int, count: int) -> np.ndarray:
    """The first `count` numbers, uint64, of the generator of Steele, Lea and Flood ("Fast splittable pseudorandom
    number generators", 2014, figure 17), which mixes a counter."""
    z = np.uint64(state) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(size: int, *key: str | int) -> np.ndarray:
    """A permutation of 0 … size - 1, int64."""
    return np.argsort(splitmix64(key_state(*key), size), kind="stable")


def even_offsets(numbers: np.ndarray, *key: str | int) -> np.ndarray:
    """One number in [0, 1) for each of `numbers` (integers from 0 on), float64 in steps of 2^-32.

    Those of consecutive integers are evenly spread over [0, 1): among the first n, the share below any x is x up to
    O(log n) / n.
    """
    weyl = np.uint64(key_state(*key)) + numbers.astype(np.uint64) * GOLDEN
    return (weyl >> np.uint64(32)) * 2.0**-32
