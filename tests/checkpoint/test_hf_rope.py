"""The three spellings of rotary embedding: each is read, they must agree, and all are written."""

import logging

import pytest

from qwen2_jax.checkpoint.hf_config import from_hf, to_hf
from qwen2_jax.config import RopeConfig
from qwen2_jax.errors import UserError

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256, "model_type": "qwen2",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
EXPECTED_YARN = RopeConfig(theta=5000.0, kind="yarn", factor=4.0, original_max_position=64)


def scaled(scaling: object, **more) -> dict:
    return {"rope_theta": 5000.0, "rope_scaling": scaling, **more}


def rope(**fields) -> RopeConfig:
    return from_hf(BASE | fields).rope


@pytest.mark.parametrize("fields", [
    {"rope_theta": 5000},
    {"rope_theta": 5000.0, "rope_scaling": None},
    scaled({}),
    scaled({"type": "default"}),
    {"rope_parameters": {"rope_theta": 5000.0}},
    {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "rope_scaling": None},
    {"rope_theta": 5000, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
])
def test_plain_rope_in_every_spelling(fields):
    assert rope(**fields) == RopeConfig(theta=5000.0)


@pytest.mark.parametrize("fields", [
    scaled(YARN | {"type": "yarn"}),
    scaled(YARN | {"rope_type": "yarn"}),
    scaled(YARN | {"rope_type": "yarn", "type": "yarn", "factor": 4}),
    {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5000.0}},
    {"rope_theta": 5000.0, "rope_parameters": YARN | {"rope_type": "yarn"}},
    scaled(YARN | {"type": "yarn"}, rope_parameters=YARN | {"rope_type": "yarn", "beta_fast": 32, "truncate": True}),
    scaled({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=64),
    scaled({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}),
    scaled(YARN | {"rope_type": "yarn", "beta_fast": None, "beta_slow": 0, "mscale": 0}),
    scaled(YARN | {"rope_type": "yarn", "attention_factor": None}),
])
def test_yarn_in_every_spelling(fields):
    assert rope(**fields) == EXPECTED_YARN


def test_every_field_of_yarn_arrives_and_is_written():
    more = {"attention_factor": 1.5, "beta_fast": 20, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9}
    cfg = from_hf(BASE | scaled(YARN | more | {"type": "yarn", "truncate": False}))
    assert cfg.rope == RopeConfig(theta=5000.0, kind="yarn", factor=4.0, original_max_position=64, attention_factor=1.5,
                                  beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9, truncate=False)
    assert from_hf(to_hf(cfg)).rope == cfg.rope


def test_the_original_length_is_the_whole_one_unless_stated():
    assert rope(rope_theta=5000, rope_scaling={"type": "yarn", "factor": 2.0}).original_max_position == 256


def test_a_null_truncate_means_false_as_in_transformers():
    assert rope(rope_theta=5000, rope_scaling=YARN | {"type": "yarn", "truncate": None}).truncate is False


def test_linear_scaling():
    assert rope(rope_theta=5000, rope_scaling={"type": "linear", "factor": 2}) == RopeConfig(
        theta=5000.0, kind="linear", factor=2.0)


def test_written_in_both_spellings():
    written = to_hf(from_hf(BASE | scaled(YARN | {"type": "yarn"})))
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"] == YARN | {"type": "yarn", "rope_type": "yarn"}
    assert written["rope_parameters"] == YARN | {"rope_type": "yarn", "rope_theta": 5000.0}
    plain = to_hf(from_hf(BASE | {"rope_theta": 5000.0}))
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    linear = to_hf(from_hf(BASE | scaled({"type": "linear", "factor": 2.0})))
    assert linear["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}


def test_when_to_scale_is_the_callers_choice():
    config = BASE | scaled(YARN | {"type": "yarn"})
    assert from_hf(config).rope.when == "always"
    assert from_hf(config, rope_when="long").rope.when == "long"
    assert from_hf(BASE | {"rope_theta": 5000.0}, rope_when="long").rope == RopeConfig(theta=5000.0)
    with pytest.raises(UserError, match="linear with rope_when long needs original_max_position_embeddings"):
        from_hf(BASE | scaled({"type": "linear", "factor": 2.0}), rope_when="long")


def test_fields_that_a_kind_does_not_read_are_passed_over_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert rope(**scaled({"type": "default", "factor": 4.0})) == RopeConfig(theta=5000.0)
        assert rope(rope_theta=5000, rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3}).factor == 2.0
    first, second = (record.getMessage() for record in caplog.records)
    assert "rope_scaling.factor has no effect here" in first
    assert "rope_scaling.beta_fast has no effect here" in second


@pytest.mark.parametrize(("fields", "message"), [
    ({}, r"rope_theta is missing; needed: a finite number, here or in rope_parameters"),
    (scaled({"type": "dynamic", "factor": 2.0}),
     r'rope_scaling.type is "dynamic"; supported: rope_type default, linear, yarn'),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000}}, r'rope_parameters.rope_type is "llama3"'),
    ({"rope_theta": 5000, "rope_scaling": YARN}, r"rope_scaling.rope_type is missing beside rope_scaling.factor"),
    (scaled(YARN | {"rope_type": "yarn", "type": "linear"}),
     r'rope_scaling.rope_type is "yarn" but rope_scaling.type is "linear"; make them equal'),
    ({"rope_theta": 5000, "rope_parameters": {"rope_theta": 6000}},
     r"rope_theta is 5000.0 but rope_parameters.rope_theta is 6000.0; make them equal"),
    (scaled(YARN | {"type": "yarn"}, rope_parameters=YARN | {"type": "yarn", "factor": 2}),
     r"rope_scaling.factor is 4.0 but rope_parameters.factor is 2.0; make them equal"),
    (scaled(YARN | {"type": "yarn"}, rope_parameters={"rope_type": "default"}),
     r'rope_scaling.rope_type is "yarn" but rope_parameters.rope_type is "default"'),
    (scaled(YARN | {"type": "yarn"}, original_max_position_embeddings=32),
     r"original_max_position_embeddings is 32 but rope_scaling.original_max_position_embeddings is 64"),
    (scaled({"type": "yarn"}), r"rope_scaling.factor is missing"),
    (scaled({"type": "linear", "factor": None}), r"rope_scaling.factor is missing"),
    (scaled({"type": "linear", "factor": 0.5}), r"rope factor must be .* found 0.5"),
    (scaled(YARN | {"type": "yarn", "factor": "4"}), r"rope_scaling.factor must be a finite"),
    (scaled(YARN | {"type": "yarn", "original_max_position_embeddings": 64.0}),
     r"rope_scaling.original_max_position_embeddings must be a whole number, found 64.0"),
    (scaled(YARN | {"type": "yarn", "original_max_position_embeddings": 0}),
     r"original_max_position_embeddings must be a positive whole number"),
    (scaled(YARN | {"type": "yarn", "attention_factor": 0}), r"attention_factor is 0"),
    (scaled(YARN | {"type": "yarn", "beta_fast": 1, "beta_slow": 2}), r"beta_slow <= beta_fast"),
    (scaled(YARN | {"type": "yarn", "partial_rotary_factor": 0.5}), r"partial_rotary_factor"),
    (scaled(YARN | {"type": "yarn", "mrope_section": [1, 2]}),
     r"unknown field rope_scaling.mrope_section is \[1, 2\]"),
    (scaled("yarn"), r"rope_scaling must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5000}}}, r"rope_theta is missing"),
    ({"rope_theta": 1, "rope_scaling": YARN | {"type": "yarn"}}, r"yarn needs rope_theta above 1"),
])
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        rope(**fields)
