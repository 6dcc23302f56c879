"""Language identification by the model that py3langid brings."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from qwen2_jax.data.quality.language import LanguageIdentifier, py3langid
from qwen2_jax.errors import UserError

# Codes of the Universal Declaration's translations → ISO 639.
TRANSLATIONS = {
    "eng": "en", "deu": "de", "fra": "fr", "spa": "es", "por_BR": "pt", "ita": "it", "rus": "ru", "jpn": "ja",
    "kor": "ko", "vie": "vi", "tha": "th", "arb": "ar", "cmn_hans": "zh", "hin": "hi", "tur": "tr", "pol": "pl",
}


@pytest.fixture(scope="module")
def identify():
    return LanguageIdentifier()


@pytest.mark.parametrize(("text", "language"), [
    ("Bonjour tout le monde, comment allez-vous aujourd'hui ?", "fr"),
    ("All human beings are born free and equal in dignity and rights.", "en"),
    ("人人生而自由，在尊严和权利上一律平等。", "zh"),
    ("すべての人間は、生まれながらにして自由である。", "ja"),
])
def test_names_the_language(identify, text, language):
    found, confidence = identify(text)
    assert found == language
    assert 0.5 < confidence <= 1


def test_text_in_no_language_is_not_sure(identify):
    assert identify("")[1] < 0.1
    assert identify("def f(x): return x+1")[1] < 0.5
    assert {"en", "zh", "zxx"} <= set(identify.languages())


def test_a_long_text_is_judged_by_its_beginning(identify):
    english = "All human beings are born free. " * 1000
    assert identify(english + "Todos los seres humanos nacen libres. " * 5000) == identify(english[:20_000])


def test_real_translations(identify, shared):
    path = shared / "data" / "train" / "udhr_multilingual.jsonl.gz"
    rows = {row["code"]: row["text"] for row in map(json.loads, gzip.open(path, "rt", encoding="utf-8"))}
    assert {code: identify(rows[code])[0] for code in TRANSLATIONS} == TRANSLATIONS


def test_py3langid_missing_is_said_in_one_line(monkeypatch):
    py3langid.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match=r"py3langid.*pip install \"qwen2_jax\[data\]\""):
        LanguageIdentifier()
