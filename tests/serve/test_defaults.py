"""generation_config.json, the caller's arguments, and what is refused before anything runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.serve.defaults import MAX_NEW_TOKENS, GenerationDefaults, check_seed, check_settings, check_stop
from qwen2_jax.serve.scheduler import Sampling

INSTRUCT = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
            "eos_token_id": [151645, 151643], "pad_token_id": 151643, "transformers_version": "4.41.2"}
BASE = {"bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048}
NOTHING = dict(temperature=None, top_p=None, top_k=None, repetition_penalty=None)


@pytest.fixture
def read(tmp_path):
    def defaults(config) -> GenerationDefaults:
        (tmp_path / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return GenerationDefaults.read(tmp_path)

    return defaults


def test_without_a_file_it_is_greedy(tmp_path):
    defaults = GenerationDefaults.read(tmp_path)
    assert defaults.choose(**NOTHING) == Sampling() and defaults.max_new_tokens == MAX_NEW_TOKENS
    assert defaults.choose(**NOTHING | dict(temperature=0.5)) == Sampling(temperature=0.5)


def test_a_file_that_samples(read):
    defaults = read(INSTRUCT)
    file = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert defaults.stop_ids == (151645, 151643) and defaults.max_new_tokens == MAX_NEW_TOKENS
    assert defaults.choose(**NOTHING) == file
    assert defaults.choose(**NOTHING | dict(temperature=0)) == Sampling(
        temperature=0, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert defaults.choose(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0) == Sampling(temperature=1.0)


def test_a_file_that_does_not_sample(read):
    defaults = read(BASE)
    assert defaults.stop_ids == (151643,) and defaults.max_new_tokens == 2048
    assert defaults.choose(**NOTHING) == Sampling()
    # As in transformers, the penalty counts without sampling too; filters come back with a temperature.
    defaults = read(BASE | {"repetition_penalty": 1.1, "top_k": 5, "temperature": 0.3})
    assert defaults.choose(**NOTHING) == Sampling(repetition_penalty=1.1)
    assert defaults.choose(**NOTHING | dict(temperature=2)) == Sampling(temperature=2, top_k=5, repetition_penalty=1.1)


@pytest.mark.parametrize("config, expected", [
    ({}, Sampling()),
    ({"do_sample": True}, Sampling(temperature=1.0)),
    ({"do_sample": True, "top_p": 0.5, "top_k": None, "temperature": None}, Sampling(temperature=1.0, top_p=0.5)),
    ({"do_sample": None, "temperature": 0.3}, Sampling()),
])
def test_partial_files(read, config, expected):
    assert read(config).choose(**NOTHING) == expected


def test_settings_of_transformers_that_have_no_effect_here_are_said(read, caplog):
    read({"no_repeat_ngram_size": 3, "num_beams": 1, "min_p": 0.0, "bad_words_ids": [], "stop_strings": ["a"],
          **INSTRUCT})
    assert [r.getMessage().partition("generation_config.json: ")[2] for r in caplog.records] == [
        "no_repeat_ngram_size is not implemented and has no effect, found 3",
        'stop_strings is not implemented and has no effect, found ["a"]']


@pytest.mark.parametrize("config, message", [
    ("{", "generation_config.json"),
    ("[]", "generation_config.json"),
    ({"do_sample": 1}, "generation_config.json: do_sample must be true or false, found 1"),
    ({"temperature": "hot"}, "temperature must be a finite number"),
    ({"temperature": -1}, "generation_config.json: temperature must be a number of at least 0"),
    ({"top_p": 1.5}, "top_p must be between 0 and 1"),
    ({"top_k": -1}, "top_k must be a whole number of at least 0"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number between"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"eos_token_id": "2"}, "eos_token_id must be a list of whole numbers"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is"),
    ({"eos_token_id": 2**40}, "eos_token_id is"),
])
def test_files_that_are_refused_by_name(read, config, message):
    with pytest.raises(UserError, match=r"generation_config\.json") as error:
        read(config)
    assert message in str(error.value)


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=math.nan), "temperature must be a number of at least 0 (0 is greedy), found nan"),
    (dict(temperature=-0.1), "temperature must be"), (dict(temperature=math.inf), "temperature must be"),
    (dict(temperature="hot"), "temperature must be"), (dict(temperature=1e39), "temperature must be"),
    (dict(temperature=True), "temperature must be"),
    (dict(top_p=-0.1), "top_p must be between 0 and 1, found -0.1"), (dict(top_p=1.1), "top_p"),
    (dict(top_p=math.nan), "top_p"),
    (dict(top_k=-1), "top_k must be a whole number of at least 0 (0 is off), found -1"), (dict(top_k=2.5), "top_k"),
    (dict(top_k=2**31), "top_k"), (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(repetition_penalty=-1.0), "repetition_penalty"), (dict(repetition_penalty=math.nan), "repetition_penalty"),
    (dict(repetition_penalty=1e30), "repetition_penalty must be a number between 0.001 and 1000.0 (1 is off)"),
    (dict(max_new_tokens=-1), "max_new_tokens must be a whole number of at least 0, found -1"),
    (dict(max_new_tokens=1.5), "max_new_tokens"), (dict(n=0), "n must be a whole number of at least 1, found 0"),
    (dict(seed=-1), "seed must be a whole number of at least 0"), (dict(seed=2**32), "seed must be below 4294967296"),
    (dict(seed=0.5), "seed"), (dict(stop=["a", ""]), "stop strings must be texts of at least one character, found ''"),
    (dict(stop=[5]), "stop strings"), (dict(stop="\udcff"), r"stop string '\udcff' holds a lone surrogate"),
    (dict(truncate="right"), "truncate must be 'left' or None, found 'right'"),
])
def test_settings_that_no_model_takes(settings, message):
    with pytest.raises(UserError) as error:
        check_settings(**settings)
    assert message in str(error.value)


def test_settings_that_are_fine():
    check_settings()
    check_settings(max_new_tokens=np.int64(0), temperature=np.float32(0.5), top_p=0, top_k=np.int32(5), n=3,
                   repetition_penalty=1, stop="x", seed=2**32 - 1, truncate="left")
    assert check_stop("ab") == ("ab",) and check_stop(["a", "b"]) == ("a", "b")
    assert len({check_seed(None) for _ in range(4)}) == 4
