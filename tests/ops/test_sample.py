"""Filters against transformers' processors on the same logits; the distribution of draws against its definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2_jax.ops.sample import COLDEST, SamplingSettings, filter_logits, penalise, sample

V = 37
ROUNDED = 1e-6
"""Relative, for kept logits: one multiplication and one division, each rounded once."""
EDGE = 3e-6
"""Relative: nucleus sums this close to 1 - p may fall on either side, being sums of 37 float32 in another order."""
MOST_AT_THE_EDGE = 0.05
"""Share of examples that the rule above may leave out."""
P_VALUE = 1e-6
"""A right sampler fails one test in a million; the seeds are fixed, so it fails always or never."""


def setting(temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, rows=1) -> SamplingSettings:
    return SamplingSettings(np.full(rows, temperature, np.float32), np.full(rows, top_k, np.int32),
                            np.full(rows, top_p, np.float32), np.full(rows, penalty, np.float32))


@jax.jit
def ours(logits_RV, seen_RV, s: SamplingSettings):
    return filter_logits(penalise(logits_RV, seen_RV, s.penalty_R), s)


def theirs(logits_V: np.ndarray, seen_ids: list[int], *, temperature, top_k, top_p, penalty) -> np.ndarray:
    """The processors that `generate` builds for these settings, in its order."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k != 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors(torch.tensor([seen_ids]), torch.tensor(logits_V[None]))[0].numpy()


def seen(ids: list[int]) -> np.ndarray:
    return np.isin(np.arange(V), ids)[None]


draw = jax.jit(sample)


def at_the_edge(logits_V, *, top_p, **before) -> bool:
    """Whether some sum of the smallest probabilities is, but for rounding, the 1 - p that decides."""
    kept = theirs(logits_V, top_p=1.0, **before).astype(np.float64)
    p = np.exp(kept - kept.max())
    sums = np.cumsum(np.sort(p / p.sum()))[:-1]      # the largest stays whatever the sum
    return bool((np.abs(sums - (1 - top_p)) < EDGE * (1 - top_p)).any())


left_out = {"examples": 0, "at the edge": 0}


@settings(max_examples=300)
@given(seed=st.integers(0, 2**16), spread=st.sampled_from([0.1, 1.0, 10.0]),
       temperature=st.sampled_from([1.0, 0.7, 2.0, 1e-4, 1e4]) | st.floats(0.05, 5),
       top_k=st.sampled_from([0, 1, 2, V - 1, V, 10 * V]) | st.integers(0, V),
       top_p=st.sampled_from([0.0, 1e-6, 0.5, 0.9, 1.0]) | st.floats(0, 1),
       penalty=st.sampled_from([1.0, 0.5, 1.05, 3.0]),
       seen_ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=20))
def test_filters_equal_transformers(seed, spread, temperature, top_k, top_p, penalty, seen_ids):
    logits_V = np.random.default_rng(seed).normal(0, spread, V).astype(np.float32)
    top_p = float(np.float32(top_p))    # so that both sides are told the same number
    chosen = dict(seen_ids=seen_ids, temperature=temperature, top_k=top_k, penalty=penalty)
    found = np.asarray(ours(logits_V[None], seen(seen_ids), setting(temperature, top_k, top_p, penalty)))[0]
    left_out["examples"] += 1
    if 0 < top_p < 1 and at_the_edge(logits_V, top_p=top_p, **chosen):
        left_out["at the edge"] += 1
        return
    expected = theirs(logits_V, top_p=top_p, **chosen)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=ROUNDED)
    assert kept.any() and not np.isnan(found).any()


def test_few_examples_were_left_out():
    """Runs after the one above, which counts."""
    if left_out["examples"]:
        print(left_out)
        assert left_out["at the edge"] <= MOST_AT_THE_EDGE * left_out["examples"]


def test_ties_at_the_kth_place_stay_as_in_transformers():
    logits_V = np.array([3, 1, 1, 1, 0, -0.0, 0.0] + [-2] * (V - 7), np.float32)
    for top_k in range(1, 9):
        found = np.asarray(ours(logits_V[None], seen([0]), setting(top_k=top_k)))[0]
        np.testing.assert_array_equal(found, theirs(logits_V, [0], temperature=1.0, top_k=top_k, top_p=1, penalty=1))


def test_ties_at_the_edge_of_the_nucleus_stay_together():
    logits_V = np.log(np.array([0.4, 0.2, 0.2, 0.2] + [1e-9] * (V - 4), np.float32))
    for top_p, kept in [(0.0, 1), (0.3, 1), (0.39, 1), (0.41, 4), (0.7, 4), (0.99, 4), (1.0, V)]:
        assert np.isfinite(ours(logits_V[None], seen([0]), setting(top_p=top_p))).sum() == kept
    equal_V = np.zeros(V, np.float32)
    assert np.isfinite(ours(equal_V[None], seen([0]), setting(top_p=0.0))).all()


def test_rows_have_settings_of_their_own():
    logits_RV = np.random.default_rng(0).normal(0, 3, (5, V)).astype(np.float32)
    seen_RV = np.random.default_rng(1).random((5, V)) < 0.3
    rows = [setting(), setting(0.5, 3), setting(2.0, 0, 0.6), setting(1.0, 9, 0.4, 1.7), setting(0.3, 0, 1.0, 0.8)]
    together = ours(logits_RV, seen_RV, jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows))
    for r, row in enumerate(rows):
        np.testing.assert_array_equal(together[r], ours(logits_RV[r:r + 1], seen_RV[r:r + 1], row)[0])


@functools.partial(jax.jit, static_argnames="draws")
def drawn(logits_V, s: SamplingSettings, draws: int):
    """Tokens of `draws` rows of equal logits, with keys folded as the engine folds them."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), i))(jnp.arange(draws))
    logits_RV = jnp.broadcast_to(logits_V[None], (draws, V))
    return sample(logits_RV, jnp.zeros((draws, V), bool), keys, s)


@pytest.mark.parametrize("chosen", [dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=5),
                                    dict(top_p=0.7), dict(temperature=1.5, top_k=12, top_p=0.8)], ids=str)
def test_draws_follow_the_filtered_distribution(chosen):
    draws = 20_000
    logits_V = np.random.default_rng(3).normal(0, 1.5, V).astype(np.float32)
    s = setting(**chosen, rows=draws)
    token_R, logprob_R = map(np.asarray, drawn(logits_V, s, draws))
    options = dict(temperature=1.0, top_k=0, top_p=1.0, penalty=1) | chosen
    p = torch.softmax(torch.tensor(theirs(logits_V, [0], **options)).double(), -1).numpy()
    counts = np.bincount(token_R, minlength=V)
    assert counts[p == 0].sum() == 0
    common = p * draws >= 5
    statistic = ((counts - p * draws)[common] ** 2 / (p * draws)[common]).sum()
    freedom = common.sum() - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert 0.5 * float(torch.special.erfc(torch.tensor(z / np.sqrt(2)))) > P_VALUE, (statistic, freedom)
    raw = torch.log_softmax(torch.tensor(logits_V), -1).numpy()     # temperature 1, no filter
    np.testing.assert_allclose(logprob_R, raw[token_R], atol=ROUNDED * 10)


def test_greedy_is_the_lowest_of_equal_ids_and_penalised():
    logits_RV = np.full((4, V), -1, np.float32)
    logits_RV[0, [9, 4, 30]] = 2
    logits_RV[1, 0], logits_RV[2, V - 1] = 1, 1
    logits_RV[3, [5, 6]] = 4, 3
    seen_RV = np.zeros((4, V), bool)
    seen_RV[3, 5] = True
    keys = jax.random.split(jax.random.key(0), 4)
    for temperature in (0.0, COLDEST / 2):
        token_R, logprob_R = draw(logits_RV, seen_RV, keys, setting(temperature, penalty=2.0, rows=4))
        assert token_R.tolist() == [4, 0, V - 1, 6] and token_R.dtype == jnp.int32
        raw = jax.nn.log_softmax(logits_RV)
        np.testing.assert_allclose(logprob_R, raw[np.arange(4), token_R], atol=ROUNDED)


def test_greedy_rows_among_sampled_ones():
    """A greedy row draws nothing, whatever its filters say, and does not change its neighbours' draws."""
    logits_RV = np.random.default_rng(5).normal(0, 1, (6, V)).astype(np.float32)
    keys, unseen = jax.random.split(jax.random.key(1), 6), jnp.zeros((6, V), bool)
    sampled = setting(rows=6)
    mixed = sampled._replace(temperature_R=jnp.asarray([1, 0, 1, 0, 1, 1], jnp.float32))
    mixed_R, sampled_R = (np.asarray(draw(logits_RV, unseen, keys, s)[0]) for s in (mixed, sampled))
    greedy_R = logits_RV.argmax(-1)
    assert (mixed_R == np.where([False, True, False, True, False, False], greedy_R, sampled_R)).all()
    assert (sampled_R != greedy_R).any()


def test_the_coldest_temperature_is_nearly_greedy_and_nothing_overflows():
    logits_RV = np.array([[88.0, 87.0, -90.0] + [0.0] * (V - 3)], np.float32)
    for temperature in (COLDEST, 1e-6, 1e-4):
        token_R, logprob_R = draw(logits_RV, seen([]), jax.random.split(jax.random.key(0), 1),
                                  setting(temperature, top_k=2, top_p=0.9))
        assert token_R.tolist() == [0] and np.isfinite(logprob_R).all()
