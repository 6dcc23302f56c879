"""The draws that the order of training data rests on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.draws import even_offsets, key_state, permutation, splitmix64


def mixed(state: int, place: int) -> int:
    """splitmix64 in Python's integers."""
    z = (state + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_splitmix64_gives_the_numbers_of_java():
    """The first five of `java.util.SplittableRandom(1234567)`, as unsigned integers."""
    assert splitmix64(1234567, 5).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


@given(st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_splitmix64(state, count):
    assert splitmix64(state, count).tolist() == [mixed(state, i) for i in range(count)]


@given(st.integers(0, 200), st.integers(0, 2**64), st.text())
def test_a_permutation_holds_each_number_once(size, number, word):
    assert sorted(permutation(size, word, number).tolist()) == list(range(size))


def test_keys_do_not_run_into_each_other():
    keys = [("a", 1, 23), ("a", 12, 3), ("a", 123), ("a1", 23), (1, 23, "a"), ("a", "1", 23), ("a", 1, 23, 0)]
    assert len({key_state(*key) for key in keys}) == len(keys)
    assert len({tuple(permutation(20, *key)) for key in keys}) == len(keys)


def test_all_permutations_come_up_equally_often():
    """Chi-squared over the 24 orders of four things: above 49.7 once in a thousand times, and the keys are fixed."""
    orders, counts = np.unique([permutation(4, "test", n) for n in range(2400)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 49.7


def test_offsets_of_consecutive_numbers_are_spread_evenly():
    offsets = np.sort(even_offsets(np.arange(10_000), "test", 3))
    assert 0 <= offsets[0] and offsets[-1] < 1
    # Random ones would be about 0.01 away.
    assert np.abs(offsets - np.arange(10_000) / 10_000).max() < 1e-3
