"""Which matrices Muon takes, that each is orthogonalised on its own, that a mesh changes nothing and gathers nothing.

The arithmetic is compared with PyTorch's in test_muon_torch.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen2_jax.checkpoint.tree import nested
from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig
from qwen2_jax.errors import UserError
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer
from qwen2_jax.optim.muon import MuonConfig, is_muons, orthogonal
from qwen2_jax.shapes import param_shapes
from qwen2_jax.sharding.mesh import make_mesh, shardings
from qwen2_jax.train.losses import NextTokenLoss

ROUNDING = 2e-5     # float32 sums in another order; five iterations multiply small singular values by 480

DENSE = ModelConfig(vocab=48, layers=3, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=4, tied=False, norm_eps=1e-6,
                    rope=RopeConfig(theta=1e4), max_position=32)
MOE = dataclasses.replace(DENSE, tied=True,
                          moe=MoeConfig(experts=4, top_k=2, d_expert=8, d_shared=8, dense_layers=(2,)))


def config(**changes) -> MuonConfig:
    return MuonConfig(**(dict(peak=1.0, steps=10, schedule="constant", ns_dtype="float32", clip=None) | changes))


def random_tree(cfg, seed, *, stacked=True):
    rng = np.random.default_rng(seed)
    return nested({path: rng.normal(size=shape).astype(np.float32)
                   for path, shape in param_shapes(cfg, stacked=stacked).items()})


def by_path(tree) -> dict[str, np.ndarray]:
    return {"/".join(part.key for part in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def one_update(cfg: MuonConfig, gradient, params):
    optimizer = make_optimizer(cfg)
    return by_path(jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradient, params))


@pytest.mark.parametrize("cfg", [DENSE, MOE, dataclasses.replace(DENSE, head="score", labels=3),
                                 dataclasses.replace(DENSE, head="reward")], ids=["dense", "moe", "score", "reward"])
@pytest.mark.parametrize("stacked", [True, False])
def test_muon_takes_the_matrices_of_attention_and_feed_forward(cfg, stacked):
    tree = random_tree(cfg, 0, stacked=stacked)
    found = {path for path, _ in by_path(tree).items()
             if is_muons(tuple(jax.tree_util.DictKey(part) for part in path.split("/")))}
    matrices = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down", "moe/gate", "moe/up",
                "moe/down", "moe/shared_gate", "moe/shared_up", "moe/shared_down")
    assert found == {path for path in by_path(tree) if path.endswith(matrices)}


def test_all_matrices_of_layers_and_experts_are_orthogonalised_on_their_own():
    """A gradient's size does not matter to Muon: where one layer's or one expert's grows, the others' steps stay."""
    params, gradient = random_tree(MOE, 0), random_tree(MOE, 1)
    before = one_update(config(weight_decay=0.0), gradient, params)
    grown = jax.tree.map(np.copy, gradient)
    grown["layers_0"]["moe"]["down"][1, 2] *= 1000
    grown["layers_0"]["attn"]["q"][0] *= 1000
    after = one_update(config(weight_decay=0.0), grown, params)
    for path, update in before.items():
        np.testing.assert_allclose(after[path], update, atol=ROUNDING * np.abs(update).max(), err_msg=path)
    assert np.linalg.svd(before["layers_0/moe/down"], compute_uv=False).shape == (2, 4, 8)


def test_singular_values_come_near_one():
    x = np.random.default_rng(0).normal(size=(2, 3, 20, 30)).astype(np.float32)
    for shaped in (x, np.swapaxes(x, 2, 3)):
        found = np.asarray(orthogonal(jnp.asarray(shaped), config()))
        values = np.linalg.svd(found, compute_uv=False)
        assert 0.68 < values.min() and values.max() < 1.21
        u, _, v = np.linalg.svd(shaped, full_matrices=False)
        overlap = np.einsum("rexm,rexy,remy->rem", u, found, v)       # the same singular vectors
        np.testing.assert_allclose(np.sort(overlap), np.sort(values), rtol=1e-3)


def test_the_iteration_is_optaxs():
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 20)).astype(np.float32)
    for shaped in (x, np.swapaxes(x, 2, 3)):
        theirs = optax.contrib.scale_by_muon(
            beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-1, -2))
        expected, _ = jax.jit(lambda g, tx=theirs: tx.update(g, tx.init(g)))(jnp.asarray(shaped))
        np.testing.assert_allclose(orthogonal(jnp.asarray(shaped), config()), expected, atol=ROUNDING)


def test_a_gradient_of_zeros_moves_nothing():
    """The experts that no token came to."""
    params = random_tree(MOE, 0)
    updates = one_update(config(weight_decay=0.0), jax.tree.map(np.zeros_like, params), params)
    assert all((update == 0).all() for update in updates.values())


RATIOS = {"original": {"gate": math.sqrt(24 / 16), "up": math.sqrt(24 / 16), "down": 1, "q": 1, "k": 1, "v": 1, "o": 1},
          "match_rms_adamw": dict.fromkeys(("gate", "up", "down"), 0.2 * math.sqrt(24))
          | dict.fromkeys(("q", "k", "v", "o"), 0.2 * math.sqrt(16))}


@pytest.mark.parametrize("adjustment", RATIOS)
def test_rates_by_shape_and_group(adjustment):
    """The rest's rate is `peak`, a matrix's `matrix_peak`; the shape's ratio is the direction's alone, not decay's."""
    params, gradient = random_tree(DENSE, 0), random_tree(DENSE, 1)
    cfg = config(rate_adjustment=adjustment, matrix_peak=0.5, peak=0.25, weight_decay=0.1)
    updates = one_update(cfg, gradient, params)
    adamw = one_update(AdamWConfig(peak=0.25, steps=10, schedule="constant", clip=None), gradient, params)
    p, g = by_path(params), by_path(gradient)
    names = {path: path.split("/")[-1] for path in updates}
    steps = jax.jit(lambda g: {path: orthogonal(x, cfg) for path, x in g.items()})(
        {path: g[path] for path, name in names.items() if name in RATIOS[adjustment]})
    for path, update in updates.items():
        expected = adamw[path]
        if path in steps:
            expected = -0.5 * (RATIOS[adjustment][names[path]] * steps[path] + 0.1 * p[path])
        np.testing.assert_allclose(update, expected, atol=ROUNDING, err_msg=path)


def test_the_state_holds_one_moment_of_a_matrix():
    params = random_tree(DENSE, 0)
    held = jax.eval_shape(make_optimizer(config(moments="bfloat16")).init, params)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    counts = {path: leaf.size for path, leaf in by_path(params).items()}
    matrices = sum(n for path, n in counts.items() if path.split("/")[-1] in RATIOS["original"])
    assert size == 2 * (2 * sum(counts.values()) - matrices) + 2 * 4     # and two counts of updates


MESHES = {"fsdp=2x2,tensor=2": DENSE, "fsdp=2,expert=2,tensor=2": MOE}


@functools.cache
def on_mesh(spec: str):
    """(compiled update from a fresh state, where its trees lie)"""
    cfg = MESHES[spec]
    where = shardings(NextTokenLoss(model=cfg).param_specs(mesh := make_mesh(spec)), mesh)
    optimizer = make_optimizer(config(clip=1.0), where)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0], in_shardings=(where, where),
                     out_shardings=where)
    return update.lower(random_tree(cfg, 0), random_tree(cfg, 0)).compile(), where


@pytest.mark.parametrize("spec", MESHES)
def test_a_mesh_changes_nothing(spec):
    params, gradient = random_tree(MESHES[spec], 0), random_tree(MESHES[spec], 1)
    expected = one_update(config(clip=1.0), gradient, params)
    program, where = on_mesh(spec)
    found = program(*(jax.device_put(tree, where) for tree in (gradient, params)))
    for path, update in by_path(found).items():
        np.testing.assert_allclose(update, expected[path], atol=ROUNDING * np.abs(expected[path]).max(), err_msg=path)


def test_matrices_are_dealt_out_and_none_is_gathered():
    """Each element of a stack goes to where its matrix is whole, and back; else only sums for the clip travel."""
    text = on_mesh("fsdp=2x2,tensor=2")[0].as_text()
    assert "all-to-all(" in text
    assert not re.findall(r"all-gather\(|collective-permute\(|reduce-scatter\(", text)
    summed = re.findall(r"= (.*?) all-reduce\(", text)
    assert {shape for shapes in summed for shape in re.findall(r"f32\[([\d,]*)\]", shapes)} == {""}


REFUSED = {"matrix_peak": (0.0, "matrix_peak"), "rate_adjustment": ("moonshot", "match_rms_adamw, original are"),
           "momentum": (1.0, "momentum"), "nesterov": ("yes", "nesterov"), "ns_steps": (0, "ns_steps"),
           "ns_coefficients": ((1.0, 2.0), "three numbers"), "ns_dtype": ("float16", "ns_dtype"),
           "b1": (-0.1, "b1"), "steps": (0, "steps")}


@pytest.mark.parametrize("field", REFUSED)
def test_refusals_name_the_field(field):
    value, message = REFUSED[field]
    with pytest.raises(UserError, match=message):
        config(**{field: value})
