"""How long a request may be, and in which words it is refused."""

from __future__ import annotations

import dataclasses

import pytest

from qwen2_jax.config import RopeConfig
from qwen2_jax.errors import UserError
from qwen2_jax.serve.limits import Limits
from tests.serve.models import CONFIGS, DENSE


def test_the_context():
    limits = Limits(DENSE)
    limits.check(1000, 24, "prompt 0")
    with pytest.raises(UserError, match=r"^prompt 0 has 1000 prompt tokens and 25 new ones, 1025 together; "
                                        r"the model's context is 1024$"):
        limits.check(1000, 25, "prompt 0")
    with pytest.raises(UserError, match=r"^row 1 has 1025 tokens; the model's context is 1024$"):
        limits.check(1025, 0, "row 1")


def test_the_million_token_models_end_at_their_chunk_size():
    limits = Limits(CONFIGS["chunks"])
    limits.check(40, 24, "prompt 0")
    with pytest.raises(UserError, match=r"context is 64 .dual_chunk_attention_config.chunk_size; dual chunk attention"):
        limits.check(41, 24, "prompt 0")


def test_yarn_stretches_the_context():
    yarn = RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=1024)
    assert Limits(dataclasses.replace(DENSE, rope=yarn)).context == 4096
    assert Limits(dataclasses.replace(DENSE, rope=yarn)).is_long(1025)
    assert not Limits(dataclasses.replace(DENSE, rope=yarn)).is_long(1024)
    assert not Limits(DENSE).is_long(10**9)


def test_truncation_keeps_the_end():
    limits = Limits(DENSE)
    ids = list(range(1030))
    assert limits.fit(ids, 10, "it", "left") == (ids[16:], 16)
    assert limits.fit(ids[:1014], 10, "it", "left") == (ids[:1014], 0)
    assert limits.fit(ids[:1014], 10, "it", None) == (ids[:1014], 0)
    with pytest.raises(UserError, match="1030 prompt tokens and 10 new ones"):
        limits.fit(ids, 10, "it", None)
    assert limits.fit(ids, 1023, "it", "left") == (ids[-1:], 1029)
    with pytest.raises(UserError, match="1024 new ones"):     # no room for a single token of the prompt
        limits.fit(ids, 1024, "it", "left")


def test_new_tokens_where_nobody_says_how_many():
    limits = Limits(DENSE)
    assert limits.default_new(10, 256) == 256
    assert limits.default_new(1000, 256) == 24
    assert limits.default_new(1024, 256) == limits.default_new(2000, 256) == 1     # which `check` then refuses
