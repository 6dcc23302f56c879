"""Shares over every window, numbers without gaps, weights that change with the step, bad weights."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.mixture import SLAB, Mixture, Ramp
from qwen2_jax.errors import UserError

WEIGHTS = {"web": 6.0, "code": 3.0, "none": 0.0, "books": 0.5, "math": 0.5}


def drawn(mixture: Mixture, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and number of each row of the first steps."""
    rows = [mixture.rows_of(n) for n in range(steps)]
    return np.concatenate([sources for sources, _ in rows]), np.concatenate([numbers for _, numbers in rows])


@pytest.mark.parametrize("batch_size", [1, 7, 256, 300])
def test_every_window_has_each_source_in_its_share(batch_size):
    sources, _ = drawn(Mixture(WEIGHTS, batch_size, seed=1), 9000 // batch_size)
    shares = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    cumulative = np.cumsum(sources[:, None] == np.arange(len(WEIGHTS)), axis=0)
    block = -(-256 // batch_size) * batch_size
    whole = cumulative[block - 1 :: block]
    expected = np.arange(1, len(whole) + 1)[:, None] * block * shares
    assert np.abs(np.diff(whole, axis=0) - block * shares).max() <= 2, "of a block each source has its share"
    assert np.abs(whole - expected).max() <= 3, "what is missing in one block comes in the next"
    assert (whole[:, 2] == 0).all()


def test_rows_within_a_block_come_in_no_order():
    """Runs of one source are as long as chance makes them: with two equal sources, two rows on average."""
    sources, _ = drawn(Mixture({"a": 1, "b": 1}, 8, seed=0), 500)
    runs = 1 + np.count_nonzero(np.diff(sources))
    assert abs(len(sources) / runs - 2) < 0.15


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(any), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_the_rows_of_a_source_are_numbered_without_gaps(weights, batch_size, seed):
    sources, numbers = drawn(Mixture({str(i): w for i, w in enumerate(weights)}, batch_size, seed), 600 // batch_size)
    counters = [count() for _ in weights]
    assert numbers.tolist() == [next(counters[source]) for source in sources]


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS | {"web": Ramp(((0, 1.0), (300, 0.0), (4000, 9.0)))}])
def test_a_step_is_reached_directly_as_by_walking(weights):
    walked = Mixture(weights, 4, seed=5)
    for n in range(5000):
        there = walked.rows_of(n)
    for mixture in (Mixture(weights, 4, seed=5), walked):
        mixture.rows_of(0)
        np.testing.assert_array_equal(mixture.rows_of(4999), there)


def test_counting_in_slabs_is_counting_at_once():
    """A step behind several slabs of blocks; each source has its share of all rows before."""
    batch_size, step = 64, (5 * SLAB // 2) * 4
    sources, numbers = Mixture(WEIGHTS, batch_size, seed=0).rows_of(step)
    for source, weight in enumerate(WEIGHTS.values()):
        expected = step * batch_size * weight / sum(WEIGHTS.values())
        assert np.abs(numbers[sources == source] - expected).max(initial=0) < 256


def test_a_weight_that_changes_with_the_step():
    """From nothing to three quarters along a straight line, taken at the first step of each block of 32."""
    mixture = Mixture({"web": 1.0, "long": Ramp(((320, 0.0), (960, 3.0)))}, 8, seed=2)
    sources, numbers = drawn(mixture, 1280)
    shares = sources.reshape(-1, 256).mean(axis=1)
    weights = np.clip((np.arange(40) * 32 - 320) / 640, 0, 1) * 3
    assert np.abs(shares - weights / (1 + weights)).max() <= 1 / 256
    assert not shares[:11].any() and shares[11] > 0
    assert numbers[sources == 1].tolist() == list(range((sources == 1).sum()))


def test_one_source_is_read_in_order():
    sources, numbers = drawn(Mixture({"only": 0.3}, 6, seed=9), 100)
    assert not sources.any()
    assert numbers.tolist() == list(range(600))


def test_seeds_differ():
    first, second = (drawn(Mixture(WEIGHTS, 8, seed), 100)[0] for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": -1.0, "b": 2.0}, "weight of source 'a' must be a number from 0 on, found -1"),
        ({"a": 1.0, "b": float("nan")}, "weight of source 'b' must be a number from 0 on, found nan"),
        ({"a": float("inf")}, "found inf"),
        ({"a": 0.0, "b": 0.0}, r"weights of all sources \(a, b\) are 0 at step 0"),
        ({}, "none given"),
        ({"a": Ramp(((0, 1.0), (5, -1.0)))}, "weight of source 'a'"),
        ({"a": Ramp(((0, 1.0), (50, 0.0))), "b": Ramp(((50, 0.0), (90, 1.0)))}, "are 0 at step 50"),
    ],
)
def test_bad_weights_are_refused(weights, said):
    with pytest.raises(UserError, match=said):
        Mixture(weights, 4, seed=0)


@pytest.mark.parametrize("points", [(), ((5, 1.0), (5, 2.0)), ((7, 1.0), (5, 2.0)), ((-1, 1.0),)])
def test_bad_points_are_refused(points):
    with pytest.raises(UserError, match="steps from 0 on that increase"):
        Ramp(points)
