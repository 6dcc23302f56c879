"""What cannot give an honest answer says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import qwen2_jax
from qwen2_jax.errors import UserError
from qwen2_jax.serve.lm import LM


def test_weights_that_are_not_numbers(load):
    lm = load()
    params = lm.params | {"norm": jax.tree.map(lambda x: x * jnp.nan, lm.params["norm"])}
    damaged = LM(params, lm.cfg, tokenizer=lm.tokenizer)
    with pytest.raises(UserError, match="not numbers"):
        damaged.generate([[1, 2, 3]], max_new_tokens=4, temperature=0)


@pytest.mark.parametrize("pair", [("text", 3), (None, "text"), (b"text", "text"), None, "ab", ("a", "b", "c")])
def test_pairs_that_are_no_text(load, pair):
    with pytest.raises(UserError, match="pair 1"):
        load().loglikelihood([("a", "b"), pair])


@pytest.mark.parametrize("call", [
    lambda lm: lm.generate(None), lambda lm: lm.generate(5), lambda lm: lm.generate({"a": 1}),
    lambda lm: lm.generate([1, 2, 3]), lambda lm: lm.generate(["a"], stop=5), lambda lm: lm.generate(["a"], n=10**11),
    lambda lm: lm.logits(None), lambda lm: lm.logits(5), lambda lm: lm.logits([1, 2]), lambda _: qwen2_jax.load(None),
])
def test_arguments_of_other_types(load, call):
    with pytest.raises(UserError):
        call(load())


def test_no_stop_strings_may_be_none(load):
    assert load().generate([[1, 2]], max_new_tokens=0, stop=None)[0].text == ""
