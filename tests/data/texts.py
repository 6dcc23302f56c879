"""Texts that break tokenizers, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

FRAGMENTS = (
    "\t", "\n", "\r\n", "\n\n    ", "        ", " ", "  ", "\x00", "\x07", "\x1b[0m", "\x7f", "▁", "▅",
    "\ufffd", "\ufeff",
    "👩‍👩‍👧‍👦", "🤷🏽‍♀️", "é", "e\u0301", "ﬁ", "北京", "日本語", "한국어", "مرحبا", "\U0010ffff", "<unk>", "<0x41>",
    "don't", "I'LL", "x = 1234\n", "def f(a, b):\n    return a\n", "if x:\n\tpass\n", "|>", "<|", "½",
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

plain = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map("".join)
any_text = st.lists(st.sampled_from(FRAGMENTS + CONTROL) | st.text(max_size=8), max_size=12).map("".join)
