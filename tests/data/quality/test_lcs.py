"""The bit-parallel length of the longest common subsequence against the textbook's table."""

from __future__ import annotations

import difflib
import random

from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.quality.lcs import lcs_length


def by_table(a, b) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for k, y in enumerate(b):
            row[k + 1] = before[k] + 1 if x == y else max(before[k + 1], row[k])
    return row[-1]


few_letters = st.text("abc", max_size=80)


@given(few_letters, few_letters)
def test_equals_the_table(a, b):
    assert lcs_length(a, b) == by_table(a, b) == lcs_length(b, a)


def test_long_sequences_equal_the_table():
    generator = random.Random(0)
    for letters in (2, 20, 300):
        a, b = (generator.choices(range(letters), k=500) for _ in range(2))
        assert lcs_length(a, b) == by_table(a, b)


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_is_at_least_what_difflib_matches(a, b):
    matched = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert matched <= lcs_length(a, b) <= min(len(a), len(b))


def test_words_may_be_anything():
    assert lcs_length("to be or not to be".split(), "be not to be".split()) == 4
    assert lcs_length([], "a") == lcs_length("a", []) == 0
