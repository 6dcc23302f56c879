"""Arithmetic that the model asks for, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from qwen2_jax.plan.flops import model_flops
from qwen2_jax.presets import PRESETS

SEVEN = 7_615_616_512       # parameters of Qwen2-7B, as published
ACTIVE = 14_249_270_784     # those of Qwen2-57B-A14B that a token passes through


def test_training():
    # 28 layers of 28 heads of width 128; half of 4096 tokens on average.
    assert model_flops(PRESETS["Qwen2-7B"], "train", 16, 4096) == 16 * 4096 * (6 * SEVEN + 12 * 28 * 28 * 128 * 2048)


def test_prefill_is_a_third_of_training():
    cfg = PRESETS["Qwen2-7B"]
    assert model_flops(cfg, "prefill", 4, 1000) == pytest.approx(model_flops(cfg, "train", 4, 1000) / 3)


def test_decoding_reads_all_of_the_cache():
    assert model_flops(PRESETS["Qwen2-7B"], "decode", 8, 1024) == 8 * (2 * SEVEN + 4 * 28 * 28 * 128 * 1024)


def test_experts_that_are_not_chosen_do_not_count():
    cfg = PRESETS["Qwen2-57B-A14B"]
    assert model_flops(cfg, "decode", 1, 0) == 2 * ACTIVE


def test_a_tied_table_counts_once():
    assert model_flops(PRESETS["Qwen2-0.5B"], "decode", 1, 0) == 2 * 494_032_768
