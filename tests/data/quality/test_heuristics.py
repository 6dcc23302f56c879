"""Gopher's rules: each alone, at its limit and past it, and against runs of words counted one character at a time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.quality.heuristics import broken_rules
from qwen2_jax.data.quality.rules import GopherRules
from qwen2_jax.errors import UserError

WORDS = [f"{a}{b}word" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]     # 256 different ones
GOOD = "\n".join(" ".join(WORDS[i : i + 10]) for i in range(0, 200, 10))
LIMITS = GopherRules()


def broken(text: str, **limits) -> set[str]:
    return {found.rule for found in broken_rules(text, GopherRules(**limits))}


def test_good_text_passes():
    assert broken(GOOD) == set()


def test_says_what_was_measured_and_the_limit():
    (found,) = broken_rules(" ".join(WORDS[:49]), LIMITS)
    assert (found.rule, found.value, found.limit) == ("min_words", 49, 50)


@pytest.mark.parametrize(("kept", "removed", "rule"), [
    (" ".join(WORDS[:50]), " ".join(WORDS[:49]), "min_words"),
    (GOOD.replace("word", "x"), GOOD.replace("word", ""), "min_mean_word_length"),
    (GOOD.replace("word", "wordword"), GOOD.replace("word", "wordwordw"), "max_mean_word_length"),
    (GOOD.replace("word", "word#", 20), GOOD.replace("word", "word#", 21), "max_hashes"),
    (GOOD.replace("word ", "word... ", 20), GOOD.replace("word ", "word… ", 21), "max_ellipses"),
    ("- " + GOOD.replace("\n", "\n- ", 17), "- " + GOOD.replace("\n", "\n• ", 18), "max_bullet_lines"),
    (GOOD.replace("\n", "...\n", 6), GOOD.replace("\n", "…\n", 7), "max_ellipsis_lines"),
    (GOOD + " 12345" * 50, GOOD + " 12345" * 51, "min_alphabetic_words"),
])
def test_at_the_limit_and_past_it(kept, removed, rule):
    assert rule not in broken(kept)
    assert rule in broken(removed)


def test_too_long():
    assert broken("w" + GOOD, max_words=200) == set()
    assert broken(GOOD + " more", max_words=200) == {"max_words"}


def test_stop_words_are_asked_for_when_told_to():
    assert broken(GOOD, min_stop_words=2) == {"min_stop_words"}
    assert broken(GOOD + " The, the the", min_stop_words=2) == {"min_stop_words"}
    assert broken(GOOD + " The cat That", min_stop_words=2) == set()


def test_lines_that_stood_there_before():
    lines = GOOD.splitlines()
    assert broken("\n".join(lines[:14] + lines[:6])) == {          # 6 of 20: at the limit of lines, not of characters
        "max_duplicate_line_characters", *(f"max_duplicate_{n}gram_characters" for n in range(5, 11))}
    assert "max_duplicate_lines" in broken("\n".join(lines[:13] + lines[:7]))
    assert "max_duplicate_lines" not in broken("\n".join(lines[:14] + lines[:6]))


def test_paragraphs_that_stood_there_before():
    paragraphs = GOOD.splitlines()
    kept, removed = ("\n\n".join(paragraphs[:n] + paragraphs[: 20 - n]) for n in (14, 13))
    assert "max_duplicate_paragraphs" not in broken(kept)
    assert "max_duplicate_paragraphs" in broken(removed)
    long = [*paragraphs[:17], "y" * 1000, "z" * 200, "y" * 1000]
    assert "max_duplicate_paragraph_characters" in broken("\n \n".join(long))
    assert "max_duplicate_paragraphs" not in broken("\n \n".join(long))


def share_of_runs(words: list[str], n: int, *, top: bool) -> float:
    """Marks the characters of each run, one by one."""
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    count = Counter(runs)
    most = max(count.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, run)) for run in runs if count[run] == most)

    def marked(chosen) -> int:
        words_in = {i + k for i, run in enumerate(runs) if run in chosen for k in range(n)}
        return sum(len(words[i]) for i in words_in)

    total = sum(map(len, words))
    if not top:
        return marked({run for run in count if count[run] > 1}) / total
    # The first of the longest, as several may be as long and cover one another differently.
    first = next(run for run in runs if count[run] == most and sum(map(len, run)) == longest)
    return marked({first}) / total


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=60))
def test_runs_of_words_equal_counting_them_one_by_one(words):
    nothing_allowed = GopherRules(max_top_ngram_characters=(-1.0,) * 3, max_duplicate_ngram_characters=(-1.0,) * 6)
    found = {b.rule: b.value for b in broken_rules(" ".join(words), nothing_allowed) if "gram" in b.rule}
    expected = {f"max_top_{n}gram_characters": share_of_runs(words, n, top=True) for n in (2, 3, 4)} | {
        f"max_duplicate_{n}gram_characters": share_of_runs(words, n, top=False) for n in range(5, 11)}
    assert found == {rule: round(share, 4) for rule, share in expected.items() if share}


def test_runs_of_words_at_the_limit():
    """One run of 5 words of 6 characters, twice in 400 characters: 60/400 is the limit of 0.15."""
    words = WORDS[:61] + WORDS[:5]
    rest = 400 - 6 * len(words)
    at, past = (" ".join([*words, "x" * (rest + extra)]) for extra in (0, -1))
    assert broken(at) == set()
    assert broken(past) == {"max_duplicate_5gram_characters"}


def test_words_are_not_counted_where_no_spaces_stand_between_them():
    generator = iter(range(0x4E00, 0x9FFF))
    chinese = "".join(chr(next(generator)) for _ in range(100))
    assert broken(chinese) == set()                             # one "word" of 100 characters otherwise
    assert broken(chinese[:-1]) == {"min_words"}                # two characters a word
    assert broken("\n".join([chinese] * 3)) == {
        "max_duplicate_lines", "max_duplicate_line_characters"}


def test_empty_text_is_too_short():
    assert broken("") == broken(" \n") == {"min_words"}


def test_as_many_limits_as_lengths_of_runs():
    with pytest.raises(UserError, match=r"max_top_ngram_characters is .*it must be 3 numbers"):
        GopherRules(max_top_ngram_characters=(0.2,))
