"""Every token after a document's first is a target exactly once an epoch, and nothing crosses documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.packing import PackedBatch, PackedDocuments, Piece, fill_rows, pack_exactly, plan_rows
from qwen2_jax.errors import UserError

T = 8
LENGTHS = (1, T - 1, T, T + 1, 10 * T, 0, 2)


def documents_of(lengths) -> list[np.ndarray]:
    """Token ids tell the document and the place: document * 1000 + index."""
    return [np.arange(n) + 1000 * d for d, n in enumerate(lengths)]


def expected_pairs(lengths, times: int = 1) -> Counter:
    return Counter({(1000 * d + i, 1000 * d + i + 1): times for d, n in enumerate(lengths) for i in range(n - 1)})


def pairs_of(batches: list[PackedBatch]) -> Counter:
    pairs: Counter = Counter()
    for batch in batches:
        kept = batch.weights_BT > 0
        pairs.update(zip(batch.ids_BT[kept].tolist(), batch.targets_BT[kept].tolist(), strict=True))
    return pairs


def check_layout(batch: PackedBatch, row_length: int) -> None:
    """Segments count from 1 without gaps, padding comes last and is all zero, positions run from 0 in each segment."""
    for array in (batch.ids_BT, batch.targets_BT, batch.segments_BT, batch.positions_BT):
        assert array.dtype == np.int32 and array.shape == (len(batch.ids_BT), row_length)
    assert batch.weights_BT.dtype == np.float32
    np.testing.assert_array_equal(batch.weights_BT, batch.segments_BT > 0)
    for ids, targets, segments, positions in zip(
        batch.ids_BT, batch.targets_BT, batch.segments_BT, batch.positions_BT, strict=True
    ):
        used = int((segments > 0).sum())
        for array in (segments, ids, targets, positions):
            assert not array[used:].any()
        starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
        np.testing.assert_array_equal(segments[starts], np.arange(1, len(starts) + 1))
        for start, end in zip(starts, [*starts[1:], used][: len(starts)], strict=True):
            np.testing.assert_array_equal(positions[start:end], np.arange(end - start))
            np.testing.assert_array_equal(ids[start + 1 : end], targets[start : end - 1])
            assert len(set((ids[start:end] // 1000).tolist())) == 1


def filled(rows, lengths, row_length: int) -> PackedBatch:
    documents = documents_of(lengths)
    return fill_rows([[documents[d][start : start + n + 1] for d, start, n in row] for row in rows], row_length)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_every_target_comes_once_an_epoch(batch_size):
    packed = PackedDocuments(documents_of(LENGTHS), T)
    epochs = 2 * batch_size  # a whole number of batches whatever the number of rows
    stream = [packed.batch(n, batch_size, seed=3) for n in range(epochs * len(packed) // batch_size)]
    assert pairs_of(stream) == expected_pairs(LENGTHS, epochs)
    once = list(packed.one_epoch(batch_size))
    assert pairs_of(once) == expected_pairs(LENGTHS)
    assert packed.targets == expected_pairs(LENGTHS).total()
    for batch in stream + once:
        check_layout(batch, T)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.integers(1, 20))
def test_any_lengths(lengths, row_length):
    plan = plan_rows(lengths, row_length)
    batch = filled(plan.rows, lengths, row_length)
    assert pairs_of([batch]) == expected_pairs(lengths)
    check_layout(batch, row_length)
    for row in plan.rows:
        for piece in row:
            assert piece.start % row_length == 0, "a document is cut at whole rows from its start only"


@given(st.lists(st.integers(2, 21), min_size=1, max_size=60))
def test_best_fit_leaves_no_two_rows_that_would_fit_in_one(lengths):
    plan = plan_rows(lengths, 20)
    free = sorted((20 - sum(piece.length for piece in row) for row in plan.rows), reverse=True)
    assert sum(free[:2]) < 20 or len(free) < 2


def test_a_rest_goes_into_the_fullest_row_that_has_room():
    plan = plan_rows([7, 6, 3, 3], 10)  # 6, 5, 2 and 2 pairs
    assert [[piece.length for piece in row] for row in plan.rows] == [[6, 2, 2], [5]]


@given(st.lists(st.integers(2, 70), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 19))
def test_packing_exactly_leaves_no_position_free(lengths, row_length, head):
    """Rows of full length between one that an epoch before has begun and one that the next will end."""
    pairs = sum(lengths) - len(lengths)
    head = min(head, row_length - 1, pairs)
    whole, tail = divmod(pairs - head, row_length)
    sizes = [size for size in (head, *[row_length] * whole, tail) if size]
    rows = pack_exactly([Piece(d, 0, n - 1) for d, n in enumerate(lengths)], sizes)
    assert [sum(piece.length for piece in row) for row in rows] == sizes
    assert pairs_of([filled(rows, lengths, row_length)]) == expected_pairs(lengths)


@given(st.lists(st.integers(2, 9), min_size=30, max_size=60))
def test_packing_exactly_cuts_few_documents(lengths):
    """Rows of eight documents and more: what is cut is at most one for each free place that best fit leaves."""
    pairs = sum(lengths) - len(lengths)
    rows = pack_exactly([Piece(d, 0, n - 1) for d, n in enumerate(lengths)], [64] * (pairs // 64) + [pairs % 64 or 64])
    pieces = [piece for row in rows for piece in row]
    assert len(pieces) - len(lengths) <= len(rows)


def test_the_largest_free_places_are_filled_first():
    rows = pack_exactly([Piece(0, 0, 8), Piece(1, 4, 5), Piece(2, 0, 7)], [10, 10])
    assert rows == [[Piece(0, 0, 8), Piece(1, 7, 2)], [Piece(2, 0, 7), Piece(1, 4, 3)]]


def test_what_is_left_of_a_cut_document_goes_where_it_fits_best():
    """After 5 = 3 + 2, the free places are 3, 2 and 2: the 2 goes into one of them, and the second 5 needs one cut."""
    rows = pack_exactly([Piece(d, 0, length) for d, length in enumerate((5, 5, 7, 8, 8, 7))], [10] * 4)
    assert sum(map(len, rows)) == 6 + 2


def test_a_batch_is_a_function_of_seed_and_number():
    packed = PackedDocuments(documents_of([50] * 30), T)
    late = packed.batch(40, 4, seed=1)
    other = PackedDocuments(documents_of([50] * 30), T)
    for n in range(41):
        last = other.batch(n, 4, seed=1)
    np.testing.assert_array_equal(late.ids_BT, last.ids_BT)
    assert (packed.batch(40, 4, seed=2).ids_BT != late.ids_BT).any()


def test_epochs_come_in_different_orders():
    packed = PackedDocuments(documents_of([T + 1] * 20), T)
    first, second = packed.batch(0, 20, seed=0), packed.batch(1, 20, seed=0)
    assert (first.ids_BT != second.ids_BT).any()
    assert pairs_of([first]) == pairs_of([second])


@pytest.mark.parametrize(
    ("documents", "row_length", "said"),
    [
        ([[1, 2]], 0, "row length"),
        ([[1], []], 4, "no document has at least two tokens"),
        ([], 4, "no document has at least two tokens"),
        ([[1, 2], [3, -4]], 4, "document 1 holds token id -4"),
        ([[1, 2**31]], 4, "document 0 holds token id"),
        ([[0.5, 1.5]], 4, "document 0 must be a list of token ids"),
        ([[[1, 2]]], 4, "document 0 must be a list of token ids"),
    ],
)
def test_bad_documents_are_refused(documents, row_length, said):
    with pytest.raises(UserError, match=said):
        PackedDocuments(documents, row_length)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 0), (-1, 2)])
def test_bad_batches_are_refused(n, batch_size):
    with pytest.raises(UserError, match="a batch needs"):
        PackedDocuments([[1, 2]], 4).batch(n, batch_size, seed=0)
