"""The step's loss and gradient belong to the batch: not to its split over micro-batches, rows or devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen2_jax.data.packing import PackedBatch, PackedDocuments
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import init_params
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.sharding.mesh import BATCH_SPEC, make_mesh, place
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import init_state, make_step

ROUNDING = 2e-5     # float32 sums of a few hundred terms in another order
OPTIM = AdamWConfig(peak=1e-2, steps=10, schedule="constant", clip=None)


def one_step(cfg, batch, *, mesh=None, micro_batches=1, **loss_options):
    """(parameters after one step, metrics as floats), from parameters that depend on `cfg` alone."""
    loss = NextTokenLoss(model=cfg, **loss_options)
    optimizer = make_optimizer(OPTIM)
    mesh = make_mesh(mesh)
    state = init_state(fresh_params(cfg, loss.stacked), optimizer, mesh, loss.param_specs(mesh))
    step = make_step(loss, optimizer, schedule(OPTIM), mesh=mesh, micro_batches=micro_batches)
    state, metrics = step(state, place(batch, mesh, BATCH_SPEC))
    return state.params, {name: float(value) for name, value in metrics.items()}


def fresh_params(cfg, stacked=True):
    return jax.tree.map(jnp.copy, _params(cfg, stacked))


@functools.lru_cache
def _params(cfg, stacked):
    return jax.jit(init_params, static_argnums=0, static_argnames="stacked")(cfg, jax.random.key(1), stacked=stacked)


def assert_same(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=ROUNDING), name


def rows(packed: PackedDocuments, n: int) -> PackedBatch:
    """All rows of one epoch in one batch of n rows, padded."""
    [batch] = packed.one_epoch(n)
    assert len(packed) <= n
    return batch


def test_the_split_does_not_move_loss_or_gradient(cfg, packed):
    batch = rows(packed, 16)
    counts = batch.weights_BT.reshape(8, -1).sum(1)
    assert len(set(counts)) > 1, "every part has as many targets: a mean of means would pass"
    _, expected = one_step(cfg, batch, z_coef=0.1)
    assert expected["targets"] == packed.targets
    for mesh, micro_batches in (("data=8", 1), (None, 8), ("data=2", 4), ("data=4", 2)):
        _, found = one_step(cfg, batch, z_coef=0.1, mesh=mesh, micro_batches=micro_batches)
        assert_same(found, expected)


def test_packing_does_not_move_loss_or_gradient(dense, documents):
    short = [document for document in documents if len(document) <= 17]
    packed = rows(PackedDocuments(short, 16), 16)
    assert packed.segments_BT.max() > 1
    separate = [PackedDocuments([document], 16).batch(0, 1, seed=0) for document in short]
    alone = jax.tree.map(lambda *arrays: np.concatenate(arrays), *separate)
    assert_same(one_step(dense, alone)[1], one_step(dense, packed)[1])


def test_layout_and_remat_do_not_move_loss_or_gradient(cfg, packed):
    batch = rows(packed, 16)
    _, expected = one_step(cfg, batch)
    assert_same(one_step(cfg, batch, stacked=False)[1], expected)
    for remat in ("full", "dots"):
        assert_same(one_step(cfg, batch, remat=remat)[1], expected)


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(dense, packed):
    batch = rows(packed, 16)
    params, found = one_step(dense, batch, dtype="bfloat16")
    _, expected = one_step(dense, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)     # 8 bits of mantissa, averaged over tokens
    assert found["loss"] != expected["loss"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_bfloat16_gradient_loses_nothing_where_it_is_kept(cfg, packed, micro_batches):
    """Against the gradient with respect to the float32 parameters themselves, whose last operation is the widening."""
    batch = rows(packed, 16)
    loss = NextTokenLoss(model=cfg, dtype="bfloat16")
    before, optimizer = fresh_params(cfg), optax.sgd(1.0)
    step = make_step(loss, optimizer, optax.constant_schedule(1.0), micro_batches=micro_batches)
    found, _ = step(init_state(fresh_params(cfg), optimizer), batch)
    whole = jax.jit(jax.grad(lambda params: loss.mean(loss.sums(params, batch))))(before)
    for (path, leaf), old, gradient in zip(jax.tree_util.tree_leaves_with_path(found.params), jax.tree.leaves(before),
                                           jax.tree.leaves(whole), strict=True):
        if micro_batches == 1:
            np.testing.assert_array_equal(leaf, old - gradient, err_msg=jax.tree_util.keystr(path))
        else:   # each half rounds its own sums
            np.testing.assert_allclose(leaf, old - gradient, atol=0.02 * float(abs(gradient).max()),
                                       err_msg=jax.tree_util.keystr(path))


def test_the_step_is_the_gradient_of_the_mean(dense, packed):
    """Against finite differences of the mean along one direction."""
    batch = rows(packed, 16)
    loss = NextTokenLoss(model=dense)
    before = fresh_params(dense)
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), before)
    value = jax.jit(lambda params: loss.mean(loss.sums(params, batch)))
    gradient = jax.jit(jax.grad(value))(before)
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

    def along(t):
        moved = jax.tree.map(lambda p, d: p + t * d, before, direction)
        return float(value(moved))

    assert (along(2e-4) - along(-2e-4)) / 4e-4 == pytest.approx(float(slope), rel=1e-2)
    _, metrics = one_step(dense, batch)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=ROUNDING)


def test_a_batch_without_targets_changes_nothing_but_by_decay(dense, packed):
    batch = rows(packed, 16)
    empty = dataclasses.replace(batch, weights_BT=np.zeros_like(batch.weights_BT))
    params, metrics = one_step(dense, empty)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    np.testing.assert_array_equal(params["norm"]["scale"], fresh_params(dense)["norm"]["scale"])


def test_rows_that_do_not_divide_are_refused(dense, packed):
    with pytest.raises(UserError, match="16 rows cannot be split over 12"):
        one_step(dense, rows(packed, 16), mesh="data=4", micro_batches=3)


def test_the_state_given_is_donated(dense, packed):
    optimizer = make_optimizer(OPTIM)
    state = init_state(fresh_params(dense), optimizer)
    make_step(NextTokenLoss(model=dense), optimizer, schedule(OPTIM))(state, rows(packed, 16))
    assert state.params["embed"]["table"].is_deleted()


def test_the_loss_of_each_source(dense, packed):
    """Whatever the mesh and the micro-batches; a source that the batch lacks is told as NaN."""
    whole = rows(packed, 16)
    sources_B = np.arange(16) % 3
    batch = dataclasses.replace(whole, sources_BT=np.repeat(sources_B[:, None], 16, 1).astype(np.int32))
    names = ("web", "books", "code", "none")
    expected, alone = {}, NextTokenLoss(model=dense)
    sums = jax.jit(alone.sums)
    for number, name in enumerate(names[:3]):
        own = dataclasses.replace(whole, weights_BT=whole.weights_BT * (sources_B == number)[:, None])
        expected[f"nll/{name}"] = float(alone.metrics(sums(fresh_params(dense), own))["nll"])
    _, found = one_step(dense, batch, mesh="data=2,context=2", micro_batches=2, sources=names)
    assert_same(found, expected)
    assert np.isnan(found["nll/none"])
