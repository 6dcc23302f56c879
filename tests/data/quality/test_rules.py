"""The settings of the quality tools: what they refuse, and thresholds that are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen2_jax.data.quality.rules import OVERLAP_RULES, MinHashRule, Overlap
from qwen2_jax.errors import UserError
from qwen2_jax.settings import settings


@pytest.mark.parametrize(("cls", "field", "value", "message"), [
    (MinHashRule, "threshold", 0.0, "threshold is 0.0: it must be above 0 and at most 1"),
    (MinHashRule, "threshold", 1.5, "threshold is 1.5: it must be above 0 and at most 1"),
    (MinHashRule, "shingle", 0, "shingle is 0: it must be at least 1"),
    (MinHashRule, "seed", -1, "seed is -1: it must be from 0 to 2^32 - 1"),
    (Overlap, "ngram", 0, "ngram is 0: it must be at least 1"),
    (Overlap, "exact_words", 0, "exact_words is 0: it must be at least 1, or none"),
    (Overlap, "lcs_ratio", 1.2, "lcs_ratio is 1.2: it must be from 0 to 1"),
])
def test_refuses(cls, field, value, message):
    with pytest.raises(UserError) as error:
        cls(**{field: value})
    assert str(error.value) == message


@pytest.mark.parametrize(("training", "evaluation", "qwen2", "qwen2_math"), [
    (10, 10, 13, 13),           # never: shorter than the least |LCS|
    (21, 100, 13, 13),          # 12.6
    (20, 1000, 13, 13),         # 12, as much as 13 is more
    (25, 50, 15, 16),           # exactly 15: enough for one rule, not for the other
    (1000, 55, 33, 34),         # 0.6 * 55 is 33.000000000000004 or 33 in floating point, by how it is computed
    (57, 1000, 35, 35),         # 34.2
])
def test_needed_lcs(training, evaluation, qwen2, qwen2_math):
    assert OVERLAP_RULES["qwen2"].needed_lcs(training, evaluation) == qwen2
    assert OVERLAP_RULES["qwen2_math"].needed_lcs(training, evaluation) == qwen2_math


def test_the_share_may_be_of_either_text():
    assert [replace(Overlap(), lcs_of=of).needed_lcs(1000, 50) for of in ("shorter", "evaluation", "training")] == [
        30, 30, 600]


def test_every_setting_says_what_it_is():
    assert all(setting.help for rule in (MinHashRule(), Overlap()) for setting in settings(rule))
