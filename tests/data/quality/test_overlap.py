"""Contamination planted in text: found at the thresholds, not below; nothing else is touched."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data.quality.overlap import EvaluationTexts
from qwen2_jax.data.quality.rules import OVERLAP_RULES, Overlap
from qwen2_jax.data.quality.words import Words
from tests.data.quality.test_lcs import by_table

QUESTION = [f"question{i}" for i in range(40)]


def own(count: int, salt: str = "own") -> list[str]:
    return [f"{salt}{i}" for i in range(count)]


def found(training: list[str], evaluation: list[str] = QUESTION, rule: str = "qwen2", **changes):
    texts = EvaluationTexts([" ".join(evaluation)], replace(OVERLAP_RULES[rule], **changes), Words())
    return texts.find(" ".join(training))[0]


def test_a_copy_is_found_in_whatever_stands_around_it():
    hit = found([*own(500), *QUESTION, *own(500, "after")])
    assert hit is not None
    assert (hit.evaluation, hit.exact, hit.lcs) == (0, False, 40)
    assert (hit.training_words, hit.evaluation_words) == (1040, 40)
    assert hit.shared == tuple(QUESTION[:13])


def test_punctuation_case_and_spacing_do_not_hide_a_copy():
    text = "What is 3+4, if 'x' is 7 and Y is 12? (Answer: it is not known, says the teacher.)"
    assert EvaluationTexts([text], Overlap(), Words()).find(
        "WHAT IS 3 + 4\nif x is 7 and y — is 12?? answer it is not known says the teacher")[0] is not None


@pytest.mark.parametrize(("run", "hit"), [(12, False), (13, True), (14, True)])
def test_a_shared_run_of_13_words_is_needed(run, hit):
    """All 40 words are shared, yet no run is longer than `run`."""
    broken = [*QUESTION[:run], "other", *(word for q in QUESTION[run:] for word in (q, "other"))]
    assert by_table(broken, QUESTION) == 40
    assert (found(broken) is not None) is hit


@pytest.mark.parametrize(("kept", "qwen2", "qwen2_math"), [(23, False, False), (24, True, False), (25, True, True)])
def test_the_share_of_the_shorter_text(kept, qwen2, qwen2_math):
    """24 of 40 words is 0.6: enough under `qwen2`, under `qwen2_math` it must be more."""
    near = [*QUESTION[:kept], *own(40 - kept)]
    assert (found(near) is not None) is qwen2
    assert (found(near, rule="qwen2_math") is not None) is qwen2_math


@pytest.mark.parametrize(("kept", "hit"), [(15, False), (16, True), (17, True)])
def test_least_lcs(kept, hit):
    assert (found([*QUESTION[:kept], *own(5)], min_lcs=16) is not None) is hit


def test_what_is_kept_may_be_spread_behind_the_run():
    spread = [*QUESTION[:13], *own(30), *QUESTION[13:36:2]]
    assert by_table(spread, QUESTION) == 25
    assert found(spread).lcs == 25
    assert found(spread[::-1]) is None      # in another order there is no run


@pytest.mark.parametrize("words", [3, 12, 13])
def test_a_text_equal_to_a_question_goes_under_qwen2_math(words):
    hit = found(QUESTION[:words], QUESTION[:words], rule="qwen2_math")
    assert hit.exact
    assert hit.shared == tuple(QUESTION[:words])
    assert found(QUESTION[:2], QUESTION[:2], rule="qwen2_math") is None
    texts = EvaluationTexts(map(" ".join, (QUESTION[:13], QUESTION)), OVERLAP_RULES["qwen2_math"], Words())
    hit, sharing = texts.find(" ".join(QUESTION))
    assert (hit.evaluation, hit.exact, sharing) == (1, True, [0, 1])
    assert (found(QUESTION[:words], QUESTION[:words]) is not None) is (words == 13)
    assert found(QUESTION[:words], [*QUESTION[:words], "x"], rule="qwen2_math", min_lcs=100) is None


def test_a_text_equal_to_an_answer_does_not_go_for_that():
    texts = EvaluationTexts(["two short words", "two short words"], OVERLAP_RULES["qwen2_math"], Words(),
                            whole=[False, True].__getitem__)
    assert texts.find("Two short words!")[0].evaluation == 1
    texts = EvaluationTexts(["two short words"], OVERLAP_RULES["qwen2_math"], Words(), whole=[False].__getitem__)
    assert texts.find("Two short words!") == (None, [])


def test_options_change_the_rule():
    assert found([*QUESTION[:8], *own(2)], QUESTION[:8], ngram=8, min_lcs=8) is not None
    long = [*own(1000), *QUESTION]
    assert found(long, lcs_of="training") is None
    assert found(long, lcs_of="evaluation") is not None
    upper = [word.upper() for word in QUESTION]
    keep_case = EvaluationTexts([" ".join(QUESTION)], Overlap(), Words(keep_case=True))
    assert keep_case.find(" ".join(upper)) == (None, [])


def test_names_the_text_that_shares_most_and_all_that_share():
    a = [*QUESTION[:20], *own(5, "a")]
    b = [*QUESTION, *own(5, "b")]
    texts = EvaluationTexts(map(" ".join, (a, own(40, "c"), b, b)), Overlap(), Words())
    hit, sharing = texts.find(" ".join(QUESTION))
    assert (hit.evaluation, sharing) == (2, [0, 2, 3])


def test_runs_that_the_rule_does_not_remove_are_told_as_well():
    texts = EvaluationTexts([" ".join(QUESTION)], Overlap(), Words())
    assert texts.find(" ".join([*QUESTION[:13], *own(100)])) == (None, [0])
    assert texts.find(" ".join([*QUESTION[:12], *own(100)])) == (None, [])


def by_comparing_everything(training: list[str], evaluation: list[list[str]], rule: Overlap):
    """Each pair, with sets of runs and the textbook's table."""
    def runs(words):
        return {tuple(words[i : i + rule.ngram]) for i in range(len(words) - rule.ngram + 1)}

    sharing = [k for k, words in enumerate(evaluation) if runs(words) & runs(training)]
    equal = rule.exact_words is not None and len(training) >= rule.exact_words and training in evaluation
    hits = {k for k in sharing
            if by_table(training, evaluation[k]) >= rule.needed_lcs(len(training), len(evaluation[k]))}
    return equal, hits, sharing


some_words = st.lists(st.sampled_from("abc"), max_size=14)


@given(some_words, st.lists(some_words, max_size=4), st.integers(1, 4), st.integers(1, 5), st.booleans(),
       st.none() | st.integers(1, 4), st.sampled_from(["shorter", "evaluation", "training"]))
def test_equals_comparing_everything(training, evaluation, ngram, min_lcs, strict, exact_words, lcs_of):
    rule = Overlap(ngram=ngram, min_lcs=min_lcs, strict=strict, exact_words=exact_words, lcs_of=lcs_of)
    hit, sharing = EvaluationTexts(map(" ".join, evaluation), rule, Words()).find(" ".join(training))
    equal, hits, expected = by_comparing_everything(training, evaluation, rule)
    assert sharing == expected
    assert (hit is not None) == (equal or bool(hits))
    if hit is not None:
        assert hit.exact == equal
        assert hit.lcs == by_table(training, evaluation[hit.evaluation])
        assert equal or hit.evaluation in hits


def test_other_text_is_left_alone():
    generator = random.Random(5)
    vocabulary = own(300)
    evaluation = [" ".join(generator.choices(vocabulary, k=60)) for _ in range(200)]
    texts = EvaluationTexts(evaluation, OVERLAP_RULES["qwen2_math"], Words())
    for _ in range(200):
        assert texts.find(" ".join(generator.choices(vocabulary, k=300))) == (None, [])


def test_nothing_to_find():
    for texts in ([], [""], ["too short"]):
        assert EvaluationTexts(texts, Overlap(), Words()).find(" ".join(QUESTION)) == (None, [])
    assert EvaluationTexts([" ".join(QUESTION)], Overlap(), Words()).find("") == (None, [])


def rows(path):
    return map(json.loads, gzip.open(path, "rt", encoding="utf-8"))


def test_gsm8k(shared):
    """GSM8K's training set has five near copies of test problems; the test set is found in itself."""
    data = shared / "data"
    test = [row[key] for row in rows(data / "eval" / "gsm8k_test.jsonl.gz") for key in ("question", "answer")]
    training = [f"{row['question']}\n{row['answer']}" for row in rows(data / "train" / "gsm8k_train.jsonl.gz")]
    texts = EvaluationTexts(test, OVERLAP_RULES["qwen2"], Words())
    removed = [text for text in training if texts.find(text)[0]]
    assert len(removed) == 5
    assert sum("stamps at the post office" in text for text in removed) == 1
    copies = [texts.find(text)[0] for text in test[:500] if len(Words()(text)) >= 13]
    assert len(copies) > 450
    assert all(hit and hit.lcs == hit.training_words for hit in copies)
