"""Batches are what an obvious reference makes of the same rows, and functions of what `identity` says alone."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.mixture import Ramp
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.data.stream import Stream
from qwen2_jax.errors import UserError
from tests.data.streams import T, make_stream, mixed_lengths, numbered, same_bytes

LENGTHS = (1, T - 1, T, T + 1, 10 * T)


def check_by_hand(batch: PackedBatch, document_lengths: dict[int, int]) -> Counter:
    """Walk over every position; the (document, place) of each target.

    A token is its document's number times 100,000 and its place there, so what must be at a position is known.
    """
    targets: Counter = Counter()
    for b in range(len(batch.ids_BT)):
        segment = position = 0
        document = place = -1
        for t in range(batch.ids_BT.shape[1]):
            if batch.segments_BT[b, t] != segment:
                segment, position = segment + 1, 0
                document, place = divmod(int(batch.ids_BT[b, t]), 100_000)
            assert batch.segments_BT[b, t] == segment
            assert batch.positions_BT[b, t] == position
            assert batch.ids_BT[b, t] == 100_000 * document + place
            assert batch.targets_BT[b, t] == 100_000 * document + place + 1
            assert batch.weights_BT[b, t] == 1
            assert place + 1 < document_lengths[document]
            assert batch.sources_BT is not None and batch.sources_BT[b, t] == document // 1000
            position, place = position + 1, place + 1
            targets[document, place] += 1
    return targets


def test_every_position_against_a_walk():
    stream = make_stream()
    lengths = {first + d: n for first, found in ((0, mixed_lengths(300)), (1000, mixed_lengths(100, 3)),
                                                 (2000, [5000])) for d, n in enumerate(found)}
    seen = set()
    for n in (0, 1, 50, 100, 1234):
        batch = stream.batch(n)
        for array in (batch.ids_BT, batch.targets_BT, batch.segments_BT, batch.positions_BT, batch.sources_BT):
            assert array is not None and array.dtype == np.int32 and array.shape == (8, T)
        assert batch.weights_BT.dtype == np.float32
        seen |= {document // 1000 for document, _ in check_by_hand(batch, lengths)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_token_after_a_documents_first_is_a_target_once_an_epoch(batch_size):
    """Two epochs of documents of 1, T - 1, T, T + 1 and 10 T tokens, then the third fills the last rows."""
    stream = Stream({"only": numbered(LENGTHS)}, row_length=T, batch_size=batch_size, seed=4)
    pairs = sum(LENGTHS) - len(LENGTHS)
    batches = -(-2 * pairs // (T * batch_size))
    targets: Counter = Counter()
    for n in range(batches):
        targets += check_by_hand(stream.batch(n), dict(enumerate(LENGTHS)))
    assert set(targets) == {(d, i) for d, n in enumerate(LENGTHS) for i in range(1, n)}
    more = batches * batch_size * T - 2 * pairs
    assert set(targets.values()) <= {2, 3} and sum(count == 3 for count in targets.values()) == more


def test_rows_of_sources_come_in_their_shares():
    stream = make_stream()
    batches = [stream.batch(n) for n in range(128, 256)]
    counts = Counter(source for batch in batches for source in np.asarray(batch.sources_BT)[:, 0].tolist())
    for source, weight in enumerate((0.6, 0.3, 0.2)):
        assert abs(counts[source] - 128 * 8 * weight / 1.1) < 4


def test_without_weights_sources_are_mixed_by_size():
    stream = make_stream(weights=None)
    pairs = [int(np.maximum(source.lengths.astype(int) - 1, 0).sum()) for source in stream.sources.values()]
    assert [source["weight"] for source in stream.identity()["sources"]] == pairs


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_their_rows_alone(hosts):
    whole, stream = make_stream(), make_stream()
    reading: Any = list(stream.sources.values())
    mine = 8 // hosts
    for n in range(0, 201, 10):
        expected = whole.batch(n)
        parts = []
        for host in range(hosts):
            for source in reading:
                source.reads.clear()
            parts.append(stream.batch(n, slice(host * mine, (host + 1) * mine)))
            read = sum(stop - start - 1 for source in reading for _, start, stop in source.reads)
            assert read == mine * T
        joined = PackedBatch(*(np.concatenate([getattr(part, field.name) for part in parts])
                               for field in fields(PackedBatch)))
        assert same_bytes(joined, expected)


def test_the_millionth_batch_is_reached_with_a_plan_a_source():
    """No walk: one plan for each source that has rows in it, however many epochs lie before."""
    stream = make_stream()
    batch = stream.batch(10**6)
    assert stream.blocks_planned <= 3
    assert not same_bytes(batch, stream.batch(10**6 + 1))
    assert same_bytes(batch, make_stream().batch(10**6))


def test_the_order_is_what_it_was():
    """The same arguments give the same batches in every version; what changes them raises `stream.FORMAT`."""
    digest = hashlib.sha256()
    stream = make_stream()
    for n in (*range(64), 10**6):
        digest.update(stream.batch(n).ids_BT.astype("<i4").tobytes())
    assert stream.identity()["format"] == 1
    assert digest.hexdigest() == "aad7a1ac1cc8f44b3fcb6b3b12e88e6838c72656776160f3fe3188c5e7deea20"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(lambda found: max(found) > 1),
       st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(0, 10**7))
def test_any_stream(lengths, row_length, batch_size, seed, n):
    stream = Stream({"only": numbered(lengths)}, row_length=row_length, batch_size=batch_size, seed=seed)
    batch = stream.batch(n)
    assert batch.ids_BT.shape == (batch_size, row_length)
    check_by_hand(batch, dict(enumerate(lengths)))


def test_every_argument_counts():
    """What gives other batches has another identity."""
    changes = [{"seed": 1}, {"row_length": 17}, {"batch_size": 4}, {"weights": None},
               {"weights": {"web": 0.6, "code": 0.3, "books": 0.2}},
               {"sources": {"web": numbered([9] * 99), "code": numbered([9]), "books": numbered([9])}}]
    streams = [make_stream(), *(make_stream(**change) for change in changes)]
    identities = [json.dumps(stream.identity()) for stream in streams]
    assert len(set(identities)) == len(streams)
    assert len({stream.batch(50).ids_BT.tobytes() for stream in streams}) == len(streams)


def test_the_seed_orders_documents_and_equal_sources_come_in_different_orders():
    firsts = set()
    for seed in (0, 1):
        twins = {name: numbered(mixed_lengths(300)) for name in ("a", "b")}
        stream = Stream(twins, row_length=T, batch_size=100, seed=seed)
        batch = stream.batch(0)
        assert batch.sources_BT is not None
        for source in (0, 1):
            firsts.add(batch.ids_BT[batch.sources_BT[:, 0] == source][:40].tobytes())
    assert len(firsts) == 4


def test_the_identity_is_json_and_that_of_equal_streams_is_equal():
    identity = make_stream().identity()
    assert json.loads(json.dumps(identity)) == identity == make_stream().identity()
    assert identity["sources"][2]["weight"] == [[0, 0.0], [100, 0.2]]
    renamed = {f"my {name}": source for name, source in make_stream().sources.items()}
    weights = dict(zip(renamed, (0.6, 0.3, Ramp(((0, 0.0), (100, 0.2)))), strict=True))
    assert make_stream(sources=renamed, weights=weights).identity() == identity


def test_the_order_of_the_weights_does_not_matter():
    weights = {"books": Ramp(((0, 0.0), (100, 0.2))), "code": 0.3, "web": 0.6}
    assert make_stream(weights=weights).identity() == make_stream().identity()
    assert same_bytes(make_stream(weights=weights).batch(7), make_stream().batch(7))


def test_a_stream_travels_without_its_plans():
    stream = make_stream()
    before = len(pickle.dumps(stream))
    batch = stream.batch(3)
    reading: Any = list(stream.sources.values())
    for source in reading:
        source.reads.clear()
    assert len(pickle.dumps(stream)) == before
    assert same_bytes(pickle.loads(pickle.dumps(stream)).batch(3), batch)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row_length": 0}, "row length must be at least 1, found 0"),
        ({"batch_size": 0}, "batch size must be at least 1, found 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"sources": {}}, "no source is given"),
        ({"sources": {"web": numbered([5]), "code": numbered([1, 0])}}, "'code' has nothing to train on: none of"),
        ({"sources": {"web": numbered([])}}, "'web' has nothing to train on: none of its 0"),
        ({"weights": {"web": 1.0, "code": 1.0}}, "the sources are web, code, books, weights were given for web, code"),
        ({"weights": {"web": 1.0, "code": 1.0, "books": -1.0}}, "weight of source 'books'"),
    ],
)
def test_what_cannot_be_used_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        make_stream(**changes)


@pytest.mark.parametrize(("name", "value"), [("vocab", 500), ("end_token", 7)])
def test_sources_of_different_tokenizers_are_refused(name, value):
    sources = make_stream().sources
    setattr(sources["code"], name, value)
    with pytest.raises(UserError, match=f"'web' and 'code' were prepared with different tokenizers.* {value}"):
        make_stream(sources=sources)


@pytest.mark.parametrize(("n", "rows"), [(-1, slice(None)), (0, slice(4, 9)), (0, slice(3, 3)), (0, slice(0, 8, 2))])
def test_rows_that_do_not_exist_are_refused(n, rows):
    with pytest.raises(ValueError, match="no rows"):
        make_stream().batch(n, rows)
