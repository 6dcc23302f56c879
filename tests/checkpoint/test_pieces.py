import itertools
import math
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.checkpoint import pieces
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.errors import UserError

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@given(st.integers(1, 200_000), st.integers(1, 20_000))
def test_blocks_tile_the_rows_and_stay_small(rows, width):
    cut = pieces.blocks((rows, width), F32)
    assert cut[0][0] == 0 and cut[-1][1] == rows
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cut))
    assert all(0 < (stop - start) * width * 4 <= pieces.PIECE_BYTES for start, stop in cut)
    assert len(cut) <= 2 * -(-rows * width * 4 // (pieces.PIECE_BYTES // 2)), "far more pieces than needed"


def test_blocks_are_even_where_that_is_possible():
    for shape in ((152064, 8192), (18944, 3584), (29568, 8192)):
        assert len({stop - start for start, stop in pieces.blocks(shape, F32)}) == 1


@pytest.mark.parametrize("shape, rows", [
    ((3584, 3584), 128), ((18944, 3584), 74), ((3584, 18944), 16), ((29568, 8192), 44), ((8192, 29568), 16),
    ((151936, 896), 1187),      # 4 rows or 1,187: too large a part rather than a thousand small ones
    ((151936, 8192), None), ((3584,), 3584), ((7, 3), 7),
])
def test_parts_divide_pieces(shape, rows):
    part, piece = pieces.part_rows(shape, BF16), pieces.block_rows(shape, BF16)
    assert piece % part == 0 and (rows is None or part == rows)
    size = part * math.prod(shape[1:]) * 2
    assert part == piece or pieces.PART_BYTES // 8 < size <= 4 * pieces.PART_BYTES


class Memory:
    """A reader of consecutive numbers that counts what it has handed out."""

    def __init__(self, fail_at=None):
        self.reads, self.fail_at, self.lock = 0, fail_at, threading.Lock()

    def dtype(self, slot):
        return F32

    def rows(self, slot, start, stop):
        with self.lock:
            self.reads += 1
            if self.reads == self.fail_at:
                raise UserError("damaged")
        width = slot.shape[1]
        return np.arange(start * width, stop * width, dtype=F32).reshape(stop - start, width)


def test_read_ahead_keeps_order_and_reads_only_a_little_ahead(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 4 * 10)
    reader, slot = Memory(), Slot("w", "w", (), (100, 4))
    found = []
    for n, (_, start, piece) in enumerate(pieces.read_ahead(reader, [slot], [F32])):
        assert reader.reads <= n + 1 + pieces.AHEAD
        found.append(piece)
        assert start == sum(len(p) for p in found[:-1])
    assert np.array_equal(np.concatenate(found), np.arange(400, dtype=F32).reshape(100, 4)) and len(found) == 10


def test_read_ahead_stops_reading_after_an_error(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 4)
    reader = Memory(fail_at=5)
    with pytest.raises(UserError, match="damaged"):
        list(pieces.read_ahead(reader, [Slot("w", "w", (), (1000, 4))], [F32]))
    assert reader.reads < 20
