"""Exact duplicates: the first stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.quality.exact import SeenTexts, digest


@given(st.lists(st.sampled_from(["", "a", "A", "a ", "é", "e\u0301", "\ud800"]) | st.text(max_size=3)))
def test_names_the_first_equal_text(texts):
    seen = SeenTexts()
    assert [seen.first(digest(text)) for text in texts] == [texts.index(text) for text in texts]
