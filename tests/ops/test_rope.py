"""Rotary embedding: the published numbers for Qwen2, and transformers' own frequencies for everything else."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import RopeConfig
from qwen2_jax.ops.rope import apply_rope, frequencies, rope_tables, yarn_attention_factor, yarn_ramp_bounds

QWEN2_YARN = RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=32768)

LAST_BITS = 2.4e-7
"""Relative. Both sides round the same formula in the same order; torch's power is off by a bit now and
then, which a division can double."""
MOSTLY = 0.95
"""Share of frequencies that are equal to the last bit."""


@pytest.mark.parametrize("head_dim, raw, truncated", [(128, (23.59595, 39.65088), (23, 40)),
                                                      (64, (11.79797, 19.82544), (11, 20))])
def test_yarn_ramp_of_qwen2(head_dim, raw, truncated):
    assert yarn_ramp_bounds(QWEN2_YARN, head_dim) == truncated
    loose = dataclasses.replace(QWEN2_YARN, truncate=False)
    assert yarn_ramp_bounds(loose, head_dim) == pytest.approx(raw, abs=5e-6)


@pytest.mark.parametrize("factor, expected", [(4.0, 1.138629436111989), (2.0, 1.0693147180559945), (1.0, 1.0)])
def test_yarn_temperature_of_qwen2(factor, expected):
    rope = dataclasses.replace(QWEN2_YARN, factor=factor)
    assert yarn_attention_factor(rope) == pytest.approx(expected, abs=1e-15)
    assert frequencies(rope, 128)[1] == yarn_attention_factor(rope)


def test_yarn_frequencies_of_qwen2():
    """Fast frequencies as they were, slow ones divided by the factor, in between a blend."""
    plain, _ = frequencies(RopeConfig(theta=1e6), 128)
    scaled, _ = frequencies(QWEN2_YARN, 128)
    np.testing.assert_array_equal(scaled[:24], plain[:24])
    np.testing.assert_array_equal(scaled[40:], plain[40:] / 4)
    assert np.all((scaled < plain)[24:40]) and np.all((scaled > plain / 4)[24:40])


ROPES = {
    "default": RopeConfig(theta=1e4),
    "long base": RopeConfig(theta=1e7),
    "linear": RopeConfig(theta=1e6, kind="linear", factor=3.0),
    "yarn": QWEN2_YARN,
    "yarn, one ramp step": RopeConfig(theta=1e4, kind="yarn", factor=8.0, original_max_position=4, beta_fast=1.0),
    "yarn, own betas": dataclasses.replace(QWEN2_YARN, beta_fast=20.0, beta_slow=2.0, truncate=False),
    "yarn, own temperature": dataclasses.replace(QWEN2_YARN, attention_factor=0.8),
    "yarn, mscale": dataclasses.replace(QWEN2_YARN, mscale=0.7, mscale_all_dim=1.3),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [64, 128, 20])
def test_frequencies_equal_transformers(name, head_dim):
    pytest.importorskip("torch")
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from tests.oracle import hf_rope

    theirs = Qwen2RotaryEmbedding(Qwen2Config(head_dim=head_dim, max_position_embeddings=131072,
                                              rope_parameters=hf_rope(ROPES[name])))
    ours, factor = frequencies(ROPES[name], head_dim)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=LAST_BITS, atol=0)
    assert np.mean(ours == theirs.inv_freq.numpy()) >= MOSTLY
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_rotation_keeps_lengths_and_sees_only_distances():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 64)).astype(np.float32)

    def score(query_at: int, key_at: int) -> float:
        turned = []
        for x, at in ((q, query_at), (k, key_at)):
            tables = rope_tables(jnp.array([[at]], jnp.int32), RopeConfig(theta=1e4), 64)
            turned.append(np.asarray(apply_rope(x, *tables), np.float64))
            assert np.linalg.norm(turned[-1]) == pytest.approx(np.linalg.norm(x), rel=1e-6)
        return float((turned[0] * turned[1]).sum())

    assert score(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-6)
    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-4)
    assert abs(score(5, 0) - score(0, 5)) > 1e-2


def test_rows_choose_plain_or_scaled_when_long():
    rope = dataclasses.replace(QWEN2_YARN, when="long")
    positions = jnp.array([[3, 70000]] * 2, jnp.int32)
    cos, sin = rope_tables(positions, rope, 64, jnp.array([False, True]))
    for b, alone in enumerate((RopeConfig(theta=1e6), QWEN2_YARN)):
        expected = rope_tables(positions[b:b + 1], alone, 64)
        np.testing.assert_array_equal(cos[b], expected[0][0])
        np.testing.assert_array_equal(sin[b], expected[1][0])
    with pytest.raises(ValueError, match="which rows are long"):
        rope_tables(positions, rope, 64)
