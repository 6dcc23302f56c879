"""Words: what counts as the same in two texts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.quality.words import Words, is_mostly_unspaced
from tests.data.texts import any_text


@pytest.mark.parametrize(("text", "words"), [
    ("Don't  stop:\n3+4=7,", ["don", "t", "stop", "3", "4", "7"]),
    ("x_y $\\frac{1}{2}$", ["x", "y", "frac", "1", "2"]),
    ("ＡＢＣ ﬁne", ["abc", "fine"]),
    ("今天,天气好ok的", ["今", "天", "天", "气", "好", "ok", "的"]),
    ("ถูกที่ ok", ["ถู", "ก", "ที่", "ok"]),
    ("か\u3099 ガ", ["が", "ガ"]),
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),     # vowel signs are part of their word
    ("한국어 텍스트", ["한국어", "텍스트"]),
    ("a\ud800b", ["a", "b"]),
    ("!?…", []),
])
def test_words(text, words):
    assert Words()(text) == words


def test_symbols_may_leave_nothing_behind():
    assert Words(symbols="delete")("3+4=7, don't") == ["347", "dont"]
    assert Words(symbols="delete").joined("3+4=7, don't") == "347 dont"


def test_joined_words_leave_scripts_without_spaces_together():
    assert Words().joined("今天,天气\n 好 (OK!)") == "今天 天气 好 ok"


def test_case_may_count():
    assert Words(keep_case=True)("The Straße") == ["The", "Straße"]
    assert Words()("The STRASSE") == Words()("the Straße")


@given(any_text)
def test_words_of_the_joined_words_are_the_words(text):
    words = Words()(text)
    assert Words()(" ".join(words)) == words


@given(st.text())
def test_words_hold_letters_marks_and_digits_alone(text):
    assert all(unicodedata.category(char)[0] in "LMN" for word in Words()(text) for char in word)


@pytest.mark.parametrize(("text", "unspaced"), [
    ("滚滚长江东逝水 a river", True), ("これはペンです", True), ("สวัสดีชาวโลก", True),
    ("안녕하세요 세계", False), ("An English text on 北京", False), ("123 ...", False), ("", False),
])
def test_scripts_without_spaces(text, unspaced):
    assert is_mostly_unspaced(text) is unspaced
