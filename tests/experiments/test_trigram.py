from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.trigram import Trigram

TEXT = [b"abracadabra", b"ab"]


@pytest.mark.parametrize("context", [b"ab", b"br", b"xa", b"xy", b"\0\0", b"\xff\xff"])
def test_probabilities_sum_to_1(context):
    p_c = Trigram(TEXT).probability(context)
    assert p_c.sum() == pytest.approx(1.0, rel=1e-12)
    assert p_c.min() > 0


def test_a_small_case_by_hand():
    """One document "aab": trigrams (0 0 a), (0 a a), (a a b)."""
    model = Trigram([b"aab"])
    a, b, c = b"abc"
    # Counts of single bytes: a 2, b 1; two kinds; 3 + 2 = 5.
    p_a, p_b, p_c = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5
    # After one "a": a once, b once, each from one context; two kinds; 2 + 2 = 4.
    p_b_after_a, p_c_after_a = (1 + 2 * p_b) / 4, 2 * p_c / 4
    # After "aa": b once; one kind.
    assert model.probability(b"aa")[b] == pytest.approx((1 + p_b_after_a) / 2)
    assert model.probability(b"aa")[c] == pytest.approx(p_c_after_a / 2)
    # "xa" was never seen: what follows "a" decides. After "c" nothing was seen either: the single bytes decide.
    assert model.probability(b"xa")[b] == pytest.approx(p_b_after_a)
    assert model.probability(b"xc")[a] == pytest.approx(p_a)


def test_bits_are_those_of_all_bytes_the_first_included():
    model = Trigram(TEXT)
    text = b"\0\0" + b"abz"
    expected = -sum(math.log2(model.probability(text[i:i + 2])[text[i + 2]]) for i in range(3))
    assert model.bits(b"abz") == pytest.approx(expected)
    assert model.bits(b"") == 0


def test_documents_do_not_touch():
    model = Trigram([b"ab", b"cd"])
    joined = Trigram([b"abcd"])
    c = ord("c")
    assert joined.probability(b"ab")[c] > 0.5 > model.probability(b"ab")[c]
    np.testing.assert_allclose(model.probability(b"\0\0")[c], model.probability(b"\0\0")[ord("a")])


def test_it_learns_what_it_sees():
    assert Trigram([b"abc" * 100]).bits(b"abc" * 100) / 300 < 0.2
    assert Trigram([b"abc" * 100]).bits(bytes(range(1, 256))) / 255 > 8
