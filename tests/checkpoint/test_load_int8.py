"""Quantizing while reading, for a process that holds some columns of a matrix only."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen2_jax.checkpoint.load import _Leaf
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.ops.quant import quantize_rows


class Stored:
    """A reader of one matrix in memory."""

    def __init__(self, w_OD: np.ndarray):
        self._w_OD = w_OD

    def dtype(self, slot):
        return self._w_OD.dtype

    def rows(self, slot, start, stop, columns=slice(None)):
        return self._w_OD[start:stop, columns]


def test_a_scale_is_that_of_the_whole_row():
    w_OD = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    whole = quantize_rows(w_OD, np)
    with ThreadPoolExecutor() as pool:
        leaf = _Leaf(Stored(w_OD), (1, 6, 8), [((0,), Slot("o", "layers_0/attn/o", (0,), (6, 8)))], None, pool)
        for rows, columns in ((slice(None), slice(0, 4)), (slice(2, 5), slice(4, 8))):
            part = leaf.read_int8((slice(0, 1), rows, columns))
            np.testing.assert_array_equal(part.values[0], whole.values[rows, columns])
            np.testing.assert_array_equal(part.scale[0], whole.scale[rows])
            np.testing.assert_array_equal(leaf.read((slice(0, 1), rows, columns))[0], w_OD[rows, columns])
