"""The vocabulary's ends: embedding rows and log-probabilities, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen2_jax.ops.vocab import _part, embed, target_logprobs
from qwen2_jax.sharding.axes import FSDP, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, make_mesh, per_device
from qwen2_jax.sharding.split import Split

FLOAT32 = 2e-6
"""Relative: sums over 97 logits and 13 chunks in another order."""


def drawn(seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 13, 8)).astype(np.float32)
    table = rng.normal(size=(97, 8)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(table), jnp.asarray(rng.integers(0, 97, (3, 13)), jnp.int32)


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [4, 39, 1024])
def test_log_probabilities_and_gradients_equal_torch(chunk):
    torch = pytest.importorskip("torch")
    x, table, targets = drawn()

    def loss(x, table):
        logprob, lse, correct = target_logprobs(x, table, targets, chunk=chunk)
        return -logprob.sum() + 0.3 * jnp.square(lse).sum(), (logprob, lse, correct)

    grads, (logprob, lse, correct) = jax.grad(loss, (0, 1), has_aux=True)(x, table)
    tx, tt = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x, table))
    z = tx @ tt.T
    their_logprob = torch.log_softmax(z, -1).gather(-1, torch.tensor(np.asarray(targets)).long()[..., None])[..., 0]
    their_lse = z.logsumexp(-1)
    (-their_logprob.sum() + 0.3 * their_lse.square().sum()).backward()
    np.testing.assert_allclose(logprob, their_logprob.detach(), rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(lse, their_lse.detach(), rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_array_equal(correct, z.argmax(-1).numpy() == np.asarray(targets))
    for ours, theirs in zip(grads, (tx.grad, tt.grad), strict=True):
        assert np.linalg.norm(ours - theirs.numpy()) <= FLOAT32 * np.linalg.norm(theirs)


@pytest.mark.parametrize("vocab", [96, 92])
@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2x2"])
def test_a_table_spread_over_devices_equals_a_whole_one(vocab, mesh):
    """A part of each device's rows at a time: four of 24 rows; of 23, which has no divisor, the last one filled up."""
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 13, 8), (vocab, 8)))
    targets = jnp.asarray(rng.integers(0, vocab, (4, 13)), jnp.int32)
    mesh = make_mesh(mesh)
    over = Axes.of(mesh).live(FSDP)

    def spread(x, table, targets, *, ax):
        return target_logprobs(x, ax.vary(table, over), targets, Split(ax, spread=over), chunk=4)

    on_mesh = per_device(spread, mesh, (BATCH_SPEC, P(over), BATCH_SPEC), BATCH_SPEC)

    def both(seen):
        def loss(x, table):
            logprob, lse, correct = seen(x, table, targets)
            return -logprob.sum() + 0.3 * jnp.square(lse).sum(), (logprob, lse, correct)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, table)

    assert _part(vocab // 4, 4) == 6 and (vocab // 4) % 6 == (0 if vocab == 96 else 5)
    (*ours, correct), (*whole, expected) = (jax.tree.leaves(both(seen)) for seen in (on_mesh, target_logprobs))
    np.testing.assert_array_equal(correct, expected)
    for a, b in zip(ours, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT32 * float(jnp.abs(b).max()))


def test_ties_belong_to_the_lowest_id():
    table = jnp.ones((5, 2))
    for target, is_argmax in ((0, True), (3, False)):
        _, _, correct = target_logprobs(jnp.ones((1, 1, 2)), table, jnp.array([[target]], jnp.int32))
        assert bool(correct[0, 0]) is is_argmax


def test_certain_and_hopeless_targets_are_finite():
    x = jnp.array([[[1e4]]])
    logprob, lse, _ = target_logprobs(x, jnp.array([[1.0], [-1.0]]), jnp.array([[1]], jnp.int32))
    assert float(logprob[0, 0]) == -2e4 and float(lse[0, 0]) == 1e4


def test_frequent_tokens_keep_their_gradient_in_bfloat16():
    """A sum of 3,000 ones; bfloat16 alone would stop at 256."""
    table = jnp.zeros((10, 4), jnp.bfloat16)
    ids = jnp.concatenate([jnp.full((1, 3000), 7, jnp.int32), jnp.full((1, 5), 2, jnp.int32)], axis=1)
    g = jax.grad(lambda t: embed(ids, t).astype(jnp.float32).sum())(table)
    assert g.dtype == jnp.bfloat16
    expected = np.zeros((10, 4))
    expected[7], expected[2] = 3000, 5
    np.testing.assert_allclose(g.astype(jnp.float32), expected, rtol=2.0**-8)


def test_embedding_and_its_gradient():
    _, table, ids = drawn()
    np.testing.assert_array_equal(embed(ids, table), np.asarray(table)[np.asarray(ids)])
    g = np.random.default_rng(1).normal(size=(3, 13, 8)).astype(np.float32)
    ours = jax.grad(lambda t: (embed(ids, t) * g).sum())(table)
    expected = np.zeros_like(table)
    np.add.at(expected, np.asarray(ids), g)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
