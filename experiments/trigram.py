"""A byte trigram model: the simplest baseline that a trained language model must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BYTES = 256
START = b"\0\0"
"""What stands before a document. Source code holds no NUL, so a document's first bytes have contexts of their own."""


class Trigram:
    """P(byte | the two bytes before it), interpolated by Witten and Bell's rule down to the uniform distribution.

        p(c | ab) = (n(abc) + T(ab) p(c | b)) / (n(ab) + T(ab))

    n counts occurrences and T(ab) the different bytes seen after ab; the same rule gives p(c | b) from p(c), and p(c)
    from 1/256. (Witten and Bell 1991, method C, in the interpolated form of Chen and Goodman 1998, section 2.4.)
    """

    def __init__(self, documents: Sequence[bytes]):
        codes = np.concatenate([_trigrams(document) for document in documents])
        self._n_abc = np.bincount(codes, minlength=BYTES**3)
        n_abc = self._n_abc.reshape(BYTES, BYTES, BYTES)
        self._n_ab, self._kinds_ab = n_abc.sum(-1).reshape(-1), (n_abc > 0).sum(-1).reshape(-1)
        n_bc = n_abc.sum(0)
        p_c = _interpolate(n_bc.sum(0), n_bc.sum(), (n_bc.sum(0) > 0).sum(), 1 / BYTES)
        self._p_bc = _interpolate(n_bc, n_bc.sum(-1, keepdims=True), (n_bc > 0).sum(-1, keepdims=True), p_c).reshape(-1)

    def probability(self, context: bytes) -> np.ndarray:
        """P of each of the 256 bytes after the two of `context`."""
        a, b = context
        return self._p((a * BYTES + b) * BYTES + np.arange(BYTES))

    def bits(self, document: bytes) -> float:
        """-log2 P of all bytes of one document, its first included; the end of a document is not predicted."""
        return -float(np.log2(self._p(_trigrams(document))).sum())

    def _p(self, abc: np.ndarray) -> np.ndarray:
        ab = abc // BYTES
        return _interpolate(self._n_abc[abc], self._n_ab[ab], self._kinds_ab[ab], self._p_bc[abc % BYTES**2])


def _trigrams(document: bytes) -> np.ndarray:
    """For each byte c of the document, (256 a + b) 256 + c with the two bytes before it, int32."""
    x = np.frombuffer(START + document, np.uint8).astype(np.int32)
    return (x[:-2] * BYTES + x[1:-1]) * BYTES + x[2:]


def _interpolate(n, total, kinds, shorter) -> np.ndarray:
    """Witten and Bell's rule; a context never seen says nothing beyond the shorter one."""
    return np.where(total > 0, (n + kinds * shorter) / np.maximum(total + kinds, 1), shorter)
