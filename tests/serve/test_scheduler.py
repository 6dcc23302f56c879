"""Plans of prefill and slots: every token once, few shapes, no slot given twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.serve.engine import next_stretch
from qwen2_jax.serve.programs import DECODE_CHUNK
from qwen2_jax.serve.scheduler import (
    PREFILL_CHUNKS,
    SHORTEST_CACHE,
    SLOT_COUNTS,
    Sample,
    Scheduler,
    cache_length,
    prefill_calls,
    prefill_chunks,
    prefill_groups,
    slot_count,
)


@given(st.integers(1, 5000))
def test_chunks_cover_a_prompt(tokens):
    chunks = prefill_chunks(tokens)
    assert [c.start for c in chunks] == [sum(c.count for c in chunks[:i]) for i in range(len(chunks))]
    assert sum(c.count for c in chunks) == tokens
    assert all(c.width in PREFILL_CHUNKS and 0 < c.count <= c.width for c in chunks)
    assert all(c.count == c.width for c in chunks[:-1])
    assert all(c.start % c.width == 0 for c in chunks), "as attention's kernel needs it"
    narrow = [c for c in chunks if c.width < PREFILL_CHUNKS[-1]]
    assert len(narrow) <= 5 and sum(c.width for c in chunks) - tokens < PREFILL_CHUNKS[1]


@given(samples=st.integers(1, 500), devices=st.sampled_from([1, 2, 4, 8]), most=st.sampled_from([0, 1, 7, 32, 128]))
def test_slot_counts(samples, devices, most):
    slots = slot_count(samples, devices, most)
    assert slots % devices == 0 and slots // devices in SLOT_COUNTS
    assert slots <= max(most, devices)
    smaller = [n * devices for n in SLOT_COUNTS if n * devices < slots]
    assert all(n < samples for n in smaller), "fewer slots would have held them all"


@given(st.integers(1, 2**20))
def test_cache_lengths(tokens):
    length = cache_length(tokens)
    assert length >= tokens and length & (length - 1) == 0
    assert length == SHORTEST_CACHE or length < 2 * tokens


@given(requests=st.lists(st.integers(1, 5), min_size=1, max_size=12), devices=st.sampled_from([1, 2, 4]),
       each=st.sampled_from([1, 8]), order=st.randoms(use_true_random=False))
def test_every_sample_gets_one_slot_at_a_time(requests, devices, each, order):
    samples = [Sample(r, n) for r, count in enumerate(requests) for n in range(count)]
    scheduler = Scheduler(samples, devices=devices, slots=each * devices)
    taken, started = {}, []
    while True:
        placed = scheduler.admit()
        for p in placed:
            assert (p.device, p.slot) not in taken and p.slot < each and p.device < devices
            taken[p.device, p.slot] = p.sample
        started += [p.sample for p in placed]
        assert len(taken) == each * devices or len(started) == len(samples), "a slot stays empty while samples wait"
        groups = prefill_groups(placed)
        together = [p for group in groups for members in group.values() for p in members]
        assert sorted(together) == sorted(placed)
        for group in groups:
            for device, members in group.items():
                assert {p.device for p in members} == {device} and len({p.sample.request for p in members}) == 1
        if not taken:
            break
        for key in order.sample(sorted(taken), order.randint(1, len(taken))):
            del taken[key]
            scheduler.release(*key)
    assert started == samples


@given(st.dictionaries(st.integers(0, 3), st.integers(1, 1200), min_size=1))
def test_calls_have_one_width_and_keep_each_prompts_own_chunks(lengths):
    calls = prefill_calls({device: range(n) for device, n in lengths.items()})
    for device, n in lengths.items():
        assert [chunks[device] for _, chunks in calls if device in chunks] == prefill_chunks(n)
    assert all({c.width for c in chunks.values()} == {width} for width, chunks in calls)


def test_stretches_follow_the_clock():
    fast, steps = [], 4
    for _ in range(5):
        steps = next_stretch(steps, 0.001 * steps, DECODE_CHUNK)
        fast.append(steps)
    assert fast == [8, 16, 32, 32, 32]
    assert next_stretch(4, 8.0, DECODE_CHUNK) == 1 and next_stretch(1, 100.0, DECODE_CHUNK) == 1
    assert next_stretch(1, 0.2, DECODE_CHUNK) == 2 and next_stretch(32, 2.0, DECODE_CHUNK) == 16
    assert next_stretch(4, 0.001, 4) == 4
