"""Rows of one source: full, endless, each token a target once an epoch, reached without those before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data import source_rows
from qwen2_jax.data.packing import Piece
from qwen2_jax.data.source_rows import SourceRows

T = 8
LENGTHS = (1, T - 1, T, T + 1, 10 * T)
PAIRS = sum(LENGTHS) - len(LENGTHS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, sections and chunks so small that a few documents fill many."""
    monkeypatch.setattr(source_rows, "BLOCK_ROWS", 3)
    monkeypatch.setattr(source_rows, "BLOCK_PAIRS", 1)
    monkeypatch.setattr(source_rows, "SECTION_ROWS", 2)


def rows_of(lengths, row_length: int, *key) -> SourceRows:
    return SourceRows(np.array(lengths, np.uint32), row_length, *key)


def pairs_of(rows) -> list[tuple[int, int]]:
    return [(piece.document, piece.start + i) for row in rows for piece in row for i in range(piece.length)]


def epoch_of(lengths) -> Counter:
    return Counter((d, i) for d, n in enumerate(lengths) for i in range(n - 1))


def check_epochs(lengths, row_length: int, rows: list) -> None:
    """All rows are full. After whatever row: each pair came e times or e + 1 times, in e finished epochs."""
    pairs = sum(epoch_of(lengths).values())
    seen: Counter = Counter()
    for n, row in enumerate(rows, start=1):
        assert sum(piece.length for piece in row) == row_length
        assert all(piece.length > 0 for piece in row)
        seen.update(pairs_of([row]))
        epochs = n * row_length // pairs
        counts = {seen[pair] for pair in epoch_of(lengths)}
        assert counts <= {epochs, epochs + 1}
    assert set(seen) <= set(epoch_of(lengths))


def test_each_token_is_a_target_once_an_epoch():
    """Two epochs of documents of 1, T - 1, T, T + 1 and 10 T tokens, and as many epochs as end with a row."""
    source = rows_of(LENGTHS, T, "test")
    two = -(-2 * PAIRS // T)
    rows = [source.row(n) for n in range(PAIRS)]
    check_epochs(LENGTHS, T, rows[:two])
    twice = Counter(pairs_of(rows[:two]))
    assert set(twice) == set(epoch_of(LENGTHS)) and set(twice.values()) <= {2, 3}
    assert sum(count - 2 for count in twice.values()) == two * T - 2 * PAIRS, "the third epoch fills the last row"
    check_epochs(LENGTHS, T, rows)
    assert Counter(pairs_of(rows)) == Counter({pair: T for pair in epoch_of(LENGTHS)})


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("most_sections", [1 << 20, 4])
def test_each_token_is_a_target_once_an_epoch_over_many_blocks(monkeypatch, most_sections):
    """Also where neighbouring documents are shuffled together."""
    monkeypatch.setattr(source_rows, "MOST_SECTIONS", most_sections)
    lengths = LENGTHS * 3 + (0, 3, 0)
    source = rows_of(lengths, T, "test")
    check_epochs([max(n, 1) for n in lengths], T, [source.row(n) for n in range(3 * source.pairs // T)])


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 20), st.integers(1, 5), st.integers(1, 60), st.integers(1, 30), st.integers(1, 3),
)
def test_any_lengths(lengths, row_length, block_rows, block_pairs, most_sections, section_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_rows, "BLOCK_ROWS", block_rows)
        patch.setattr(source_rows, "BLOCK_PAIRS", block_pairs)
        patch.setattr(source_rows, "MOST_SECTIONS", most_sections)
        patch.setattr(source_rows, "SECTION_ROWS", section_rows)
        source = rows_of(lengths, row_length, "test")
        check_epochs([max(n, 1) for n in lengths], row_length, [source.row(n) for n in range(40)])


@pytest.mark.usefixtures("small_blocks")
def test_a_row_is_reached_directly_as_by_walking():
    walked, direct = rows_of(LENGTHS * 5, T, 1), rows_of(LENGTHS * 5, T, 1)
    rows = [list(walked.row(n)) for n in range(500)]
    for n in (499, 3, 250, 0):
        assert list(direct.row(n)) == rows[n]
    assert direct.blocks_planned == 4


@pytest.mark.usefixtures("small_blocks")
def test_epochs_and_keys_come_in_different_orders():
    lengths = [T + 1] * 30      # each document a row
    first = [tuple(rows_of(lengths, T, 0).row(n)) for n in range(60)]
    other = [tuple(rows_of(lengths, T, 1).row(n)) for n in range(60)]
    assert set(first[:30]) == set(first[30:]) == set(other[:30])
    assert first[:30] != first[30:] and first != other
    assert first[:30] != sorted(first[:30])


def test_rows_of_a_block_are_shuffled():
    """Best fit makes rows of long documents first; training must not see them so."""
    lengths = [T] * 500 + [3] * 500
    source = rows_of(lengths, T, "test")
    long = [any(piece.document < 500 for piece in source.row(n)) for n in range(source.pairs // T)]
    assert 1 < sum(long) < len(long) and any(long[-20:]) and not all(long[:20])


def test_a_long_document_is_shuffled_in_sections(monkeypatch):
    """A book does not come chapter by chapter, and is cut at whole rows."""
    monkeypatch.setattr(source_rows, "BLOCK_ROWS", 8)
    monkeypatch.setattr(source_rows, "BLOCK_PAIRS", 1)
    source = rows_of([1000 * T + 1], T, "test")
    starts = [source.row(n)[0].start // T for n in range(1000)]
    assert sorted(starts) == list(range(1000))
    blocks = np.array(starts).reshape(-1, 8)
    assert np.ptp(blocks, axis=1).mean() > 100


def test_few_documents_are_cut(monkeypatch):
    """Mixed lengths, rows of eight documents: of those that fit a row at most one in a hundred is cut, and no row has
    a free position."""
    monkeypatch.setattr(source_rows, "BLOCK_PAIRS", 1 << 18)
    lengths = np.clip(np.random.default_rng(0).lognormal(4.3, 1.1, 20_000), 2, 20_000).astype(np.uint32)
    source = SourceRows(lengths, 1024, "test")
    cut = {piece.document for n in range(source.pairs // 1024) for piece in source.row(n)
           if piece.length < lengths[piece.document] - 1 <= 1024}
    assert len(cut) < 200


def test_neighbours_of_very_many_documents_stay_together(monkeypatch):
    monkeypatch.setattr(source_rows, "MOST_SECTIONS", 100)
    monkeypatch.setattr(source_rows, "BLOCK_ROWS", 50)
    monkeypatch.setattr(source_rows, "BLOCK_PAIRS", 1)
    source = rows_of([T + 1] * 1005, T, "test")
    documents = [source.row(n)[0].document for n in range(1005)]
    assert sorted(documents) == list(range(1005))
    chunks = [{document // 11 for document in block} for block in np.array(documents[:1000]).reshape(-1, 50)]
    assert max(map(len, chunks)) <= 6, "a block reads from few places"
    assert documents[:50] != sorted(documents[:50])


def test_an_epoch_shorter_than_a_row():
    source = rows_of([3, 1, 2], 100, "test")
    row = list(source.row(5))
    assert sum(piece.length for piece in row) == 100
    counts = Counter(pairs_of([row]))
    assert set(counts) == {(0, 0), (0, 1), (2, 0)} and set(counts.values()) == {33, 34}


def test_the_rows_of_a_million_documents_are_reached_with_one_plan():
    source = SourceRows(np.full(1_000_000, 300, np.uint32), 4096, "test")
    assert sum(piece.length for piece in source.row(10**9)) == 4096
    assert source.blocks_planned == 1
    assert isinstance(source.row(10**9)[0], Piece)
