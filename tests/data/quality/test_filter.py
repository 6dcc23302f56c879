"""Filtering by language and heuristics."""

from __future__ import annotations

import io
import json

import pytest

from qwen2_jax.data import text_source
from qwen2_jax.data.quality.filter import Languages, filter_documents
from qwen2_jax.data.quality.language import LanguageIdentifier
from qwen2_jax.data.quality.rules import GopherRules
from qwen2_jax.data.quality.sift import Sieve
from qwen2_jax.data.source_files import SourceOptions, find_files
from qwen2_jax.errors import UserError
from tests.data.quality.test_heuristics import GOOD

ENGLISH = "All human beings are born free and equal in dignity and rights."
FRENCH = "Tous les êtres humains naissent libres et égaux en dignité et en droits."


def run(tmp_path, texts: list[str], languages: Languages | None, rules: GopherRules | None, workers: int = 1):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sieve = Sieve(io.BytesIO(), io.StringIO())
    options = SourceOptions()
    files = find_files([str(path)], options)
    filter_documents(files, options, sieve, languages=languages, rules=rules, workers=workers)
    removed = [json.loads(line) for line in sieve.removed_lines.getvalue().splitlines()]
    assert all(row.pop("file") == str(path) for row in removed)
    return [json.loads(line)["text"] for line in sieve.kept_lines.getvalue().splitlines()], removed


def test_languages(tmp_path):
    unsure = "x = f(y)"
    kept, removed = run(tmp_path, [ENGLISH, FRENCH, unsure], Languages(["en", "de"], 0.9), None)
    assert kept == [ENGLISH]
    assert [row["reason"] for row in removed] == ["other_language"] * 2
    assert (removed[0]["row"], removed[0]["language"]) == (2, "fr")
    assert 0.9 < removed[0]["confidence"] <= 1


def test_an_identification_that_is_not_sure_enough(tmp_path):
    kept, removed = run(tmp_path, [ENGLISH, FRENCH], Languages(["en", "fr"], 1.0), None)
    assert kept == []
    assert [row["reason"] for row in removed] == ["unsure_language"] * 2
    assert run(tmp_path, [ENGLISH, FRENCH], Languages(["en", "fr"]), None) == ([ENGLISH, FRENCH], [])
    exactly = LanguageIdentifier()(FRENCH)[1]
    assert run(tmp_path, [FRENCH], Languages(["fr"], exactly), None) == ([FRENCH], [])


def test_heuristics_name_the_first_rule_and_the_others(tmp_path):
    kept, removed = run(tmp_path, [GOOD, "a b c"], None, GopherRules())
    assert kept == [GOOD]
    assert removed == [{"row": 2, "reason": "min_words", "value": 3, "limit": 50,
                        "also": [{"rule": "min_mean_word_length", "value": 1.0, "limit": 3.0}]}]
    assert run(tmp_path, [GOOD], None, GopherRules(max_words=10)) == (
        [], [{"row": 1, "reason": "max_words", "value": 200, "limit": 10}])


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE_BYTES", 20_000)
    texts = [GOOD, ENGLISH, FRENCH] * 30
    one = run(tmp_path, texts, None, GopherRules())
    assert (len(one[0]), len(one[1])) == (30, 60)
    assert run(tmp_path, texts, None, GopherRules(), workers=2) == one


def test_unknown_language(tmp_path):
    with pytest.raises(UserError, match=r"language 'klingon' is not known; known are .*, en, "):
        run(tmp_path, [], Languages(["en", "klingon"]), None)
    with pytest.raises(UserError, match="the least confidence is 50: it must be from 0 to 1"):
        Languages(["en"], 50)
