"""Text of a sample against a rule on the whole text: the stop string that is complete first cuts, and nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.serve.text import SampleText
from tests.serve.models import write_tokenizer

CHARACTERS = "ab b🤗é\n"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def cut_at(text: str, stop: list[str]) -> int | None:
    """Where the text ends: read it letter by letter until some stop string is complete; of several the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return end - max(map(len, found))
    return None


@st.composite
def streams(draw):
    """(pieces of ids as they come, stop strings): encoded texts, loose bytes, control tokens."""
    text = draw(st.text(CHARACTERS, max_size=30))
    stop = draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=3))
    loose = draw(st.lists(st.integers(0, 511), max_size=4))
    cuts = draw(st.lists(st.integers(1, 5), max_size=20))
    return text, loose, cuts, stop


@given(stream=streams(), one_by_one=st.booleans())
def test_text_and_stream_follow_the_rule(tokenizer, stream, one_by_one):
    text, loose, cuts, stop = stream
    ids = [i for char in text for i in tokenizer.encode(char)] if one_by_one else tokenizer.encode(text)
    ids = [*ids, *loose]
    whole = tokenizer.decode(ids, skip_special=True)
    at = cut_at(whole, stop)
    shown: list[str] = []
    sample = SampleText(tokenizer, stop, shown.append)
    position, ended = 0, False
    for size in [*cuts, len(ids)]:
        piece, position = ids[position:position + size], position + size
        ended = sample.push(piece)
        assert whole.startswith("".join(shown)), "what was shown has changed"
        if ended or position >= len(ids):
            break
    sample.finish()
    assert sample.cut == (at is not None)
    assert sample.text == whole[:at]
    assert "".join(shown) == sample.text and all(shown)
    kept = sample.kept_tokens(ids)
    if at is None:
        assert kept == len(ids)
    else:
        # The kept ids hold the text, and without the last of them they do not.
        assert tokenizer.decode(ids[:kept], skip_special=True).startswith(sample.text)
        certain = tokenizer.stream(skip_special=True).push(ids[:kept - 1]) if kept else ""
        assert len(certain) < at or at == 0 == kept


def test_nothing_waits_that_cannot_be_a_stop(tokenizer):
    shown: list[str] = []
    sample = SampleText(tokenizer, ["END"], shown.append)
    for text, expected in [("aE", "a"), ("N", "a"), ("x", "aENx"), ("EN", "aENx"), ("D!", "aENx")]:
        ended = sample.push(tokenizer.encode(text))
        assert "".join(shown) == expected
    assert ended and sample.text == "aENx" and sample.cut


def test_the_stop_that_is_complete_first_cuts_however_the_text_is_tokenised(tokenizer):
    """Both stop strings lie in one token; the longer begins first, the shorter ends first."""
    ids = tokenizer.encode("item")
    [word] = [word for i in ids if len(word := tokenizer.decode([i])) >= 4]
    stop = [word[0:4], word[2]]
    for pieces in ([word], list(word)):
        sample = SampleText(tokenizer, stop)
        sample.push([i for piece in pieces for i in tokenizer.encode(piece)])
        assert sample.cut and sample.text == word[:2]


def test_characters_appear_whole(tokenizer):
    ids = tokenizer.encode("é🤠")
    assert len(ids) > 3, "the character must take several tokens"
    shown: list[str] = []
    sample = SampleText(tokenizer, [], shown.append)
    for i in ids[:-1]:
        sample.push([i])
    assert shown == ["é"]
    sample.finish()
    assert "".join(shown) == sample.text == "é\ufffd"


def test_the_tokenizer_is_the_same_every_time(tokenizer_folder, tmp_path):
    again = write_tokenizer(tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
