"""A long document in parts has the tokens of the whole: for Qwen2's rules and for tokenizers trained here."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data import long_text
from qwen2_jax.data.long_text import encode_documents, may_cut, parts
from qwen2_jax.data.tokenizer import Tokenizer
from tests.data.texts import CONTROL, FRAGMENTS

AROUND = ("\n", "\n", "a", "B", "7", " ", "\n\n", "\r\n", "x\u0301", "s", "'s")
fragments = st.sampled_from([*FRAGMENTS, *CONTROL, *AROUND])
texts = st.lists(fragments | st.text(max_size=4), max_size=60).map("".join)


@given(texts, st.integers(0, 30))
def test_parts_are_the_text_and_end_at_places(text, size):
    found = list(parts(text, size))
    assert "".join(found) == text
    for before, after in pairwise(found):
        assert before.endswith("\n") and after[0].isascii() and after[0].isalnum() and len(before) > size


def same_tokens(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text, special=False)
    in_parts = [i for part in parts(text, 0) for i in tokenizer.encode(part, special=False)]
    assert in_parts == whole


@given(texts)
def test_trained_here(trained, text):
    assert may_cut(trained)
    same_tokens(trained, text)


@given(texts)
def test_qwen2(qwen2, text):
    assert may_cut(qwen2)
    same_tokens(qwen2, text)


def test_long_documents_are_cut_and_short_ones_go_together(trained, training_texts, monkeypatch):
    seen = []
    monkeypatch.setattr(long_text, "LONG", 1000)
    monkeypatch.setattr(long_text.parts, "__defaults__", (1000,))
    expected = trained.encode_batch(training_texts, special=False)
    encode = trained.encode

    def watched(text: str, *, special: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, special=special)

    monkeypatch.setattr(trained, "encode", watched)
    assert [ids.tolist() for ids in encode_documents(trained, training_texts)] == expected
    assert len(seen) > 100 and max(seen) < max(map(len, training_texts))
    seen.clear()
    short = [ids.tolist() for ids in encode_documents(trained, ["a", "b"])]
    assert short == trained.encode_batch(["a", "b"], special=False)
    assert not seen


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFKC"}},
    {"normalizer": {"type": "Prepend", "prepend": "a"}},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}},
])
def test_other_rules_are_not_cut(trained_folder, tmp_path, change):
    rules = json.loads((trained_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules | change))
    assert not may_cut(Tokenizer.load(tmp_path))


def test_a_token_across_a_place_forbids_cutting(trained_folder, tmp_path):
    rules = json.loads((trained_folder / "tokenizer.json").read_text())
    rules["added_tokens"].append(rules["added_tokens"][0] | {"id": 1024, "content": "\nUser", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    tokenizer = Tokenizer.load(tmp_path)
    assert not may_cut(tokenizer)
    text = "x\nUser: y" * 3
    assert [ids.tolist() for ids in encode_documents(tokenizer, [text])] == [tokenizer.encode(text, special=False)]
