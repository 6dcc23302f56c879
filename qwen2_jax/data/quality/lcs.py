"""The length of the longest common subsequence of two sequences, all cells of a row of the table at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def lcs_length(a: Iterable[Hashable], b: Sequence[Hashable]) -> int:
    """Most items that can be kept of both so that what is kept is equal; exact.

    Bit k of an integer tells whether the table's row grows at item k of `b`, so that a row is one addition (Hyyrö 2004,
    "Bit-parallel LCS-length computation revisited", figure 2): |a| |b| / 64 steps of a few nanoseconds, beside about
    0.3 µs for each item of `a` that `b` has as well.
    """
    places: dict[Hashable, int] = {}
    for k, item in enumerate(b):
        places[item] = places.get(item, 0) | 1 << k
    everywhere = (1 << len(b)) - 1
    flat = everywhere       # where the row does not grow
    for item in a:
        if at := places.get(item):
            matches = flat & at
            flat = (flat + matches | flat - matches) & everywhere
    return len(b) - flat.bit_count()
