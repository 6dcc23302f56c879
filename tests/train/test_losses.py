"""Sums and means against formulas written out with whole logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.model.decoder import Decoder, init_params
from qwen2_jax.ops.experts import load_balancing_loss
from qwen2_jax.train.losses import NextTokenLoss

ROUNDING = 1e-5     # float32 sums of a few hundred terms


@functools.lru_cache
def prepare(cfg, z_coef=0.0):
    """(loss, its sums as a compiled function of the batch, the parameters)."""
    loss = NextTokenLoss(model=cfg, z_coef=z_coef)
    params = init_params(cfg, jax.random.key(0))
    return loss, functools.partial(jax.jit(loss.sums), params), params


def test_sums_are_those_of_the_whole_logits(cfg, packed):
    batch = packed.batch(0, 8, seed=0)
    rng = np.random.default_rng(3)
    weights = batch.weights_BT * rng.integers(0, 3, batch.weights_BT.shape)     # also counts a target twice, or not
    batch = dataclasses.replace(batch, weights_BT=weights.astype(np.float32))
    _, sums_of, params = prepare(cfg)
    sums = sums_of(batch)

    @jax.jit
    def apply(batch):
        return Decoder(cfg).apply({"params": params}, batch.ids_BT, positions_BT=batch.positions_BT,
                                  segments_BT=batch.segments_BT)

    out = apply(batch)
    z = np.asarray(out.x_BTD @ out.head["table"].T, np.float64)
    lse = np.log(np.exp(z).sum(-1))
    picked = np.take_along_axis(z, batch.targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.count, weights.sum())
    np.testing.assert_allclose(sums.nll, (weights * (lse - picked)).sum(), rtol=ROUNDING)
    np.testing.assert_allclose(sums.z, (weights * lse**2).sum(), rtol=ROUNDING)
    np.testing.assert_allclose(sums.correct, (weights * (z.argmax(-1) == batch.targets_BT)).sum())


def test_mean_and_metrics(cfg, packed):
    batch = packed.batch(0, 8, seed=0)
    loss, sums_of, _ = prepare(cfg, 0.01)
    sums = sums_of(batch)
    expected = (sums.nll + 0.01 * sums.z) / sums.count
    metrics = loss.metrics(sums)
    if cfg.moe is not None:
        # A balanced router gives k; an unbalanced one more.
        assert metrics["balance"] > cfg.moe.top_k
        assert sums.router.rows == cfg.layers * (batch.segments_BT > 0).sum()
        expected += cfg.moe.aux_loss_coef * load_balancing_loss(sums.router)
    np.testing.assert_allclose(loss.mean(sums), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], sums.nll / sums.count, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], sums.correct / sums.count, rtol=1e-6)
    assert metrics["targets"] == batch.weights_BT.sum()
    assert metrics["seen"] == (batch.segments_BT > 0).sum()


@pytest.mark.parametrize("name", ["ids_BT", "targets_BT"])
def test_padding_counts_for_nothing(cfg, packed, name):
    [batch] = packed.one_epoch(16)
    assert (batch.segments_BT == 0).any()
    _, sums_of, _ = prepare(cfg)
    scrambled = dataclasses.replace(batch, **{name: np.where(batch.segments_BT > 0, getattr(batch, name), 7)})
    for found, expected in zip(jax.tree.leaves(sums_of(scrambled)), jax.tree.leaves(sums_of(batch)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_bends_is_known_for_a_dense_batch(dense, packed):
    loss, sums_of, _ = prepare(dense, 0.01)
    batch = packed.batch(0, 8, seed=0)
    sums = sums_of(batch)
    known, whole = (jax.grad(loss.mean)(s) for s in (loss.bends_in(batch), sums))
    np.testing.assert_allclose(known.nll, whole.nll)
    np.testing.assert_allclose(known.z, whole.z)
    assert jnp.isfinite(known.nll)
