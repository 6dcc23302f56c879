"""What cannot give an honest answer says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.serve.lm import LM


def test_weights_that_are_not_numbers(load):
    lm = load()
    params = lm.params | {"norm": jax.tree.map(lambda x: x * jnp.nan, lm.params["norm"])}
    damaged = LM(params, lm.cfg, tokenizer=lm.tokenizer)
    with pytest.raises(UserError, match="not numbers"):
        damaged.generate([[1, 2, 3]], max_new_tokens=4, temperature=0)


@pytest.mark.parametrize("pair", [("text", 3), (None, "text"), (b"text", "text")])
def test_pairs_that_are_no_text(load, pair):
    with pytest.raises(UserError, match="pair 1"):
        load().loglikelihood([("a", "b"), pair])
