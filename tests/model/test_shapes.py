"""The modules declare exactly what `shapes.py` says, for every published model and both layouts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig
from qwen2_jax.model.decoder import abstract_params, init_params
from qwen2_jax.model.params import stack, unstack
from qwen2_jax.presets import PRESETS
from qwen2_jax.shapes import param_shapes

SMALL = ModelConfig(vocab=50, layers=4, d_model=16, d_ff=24, heads=2, kv_heads=1, head_dim=8, tied=False,
                    norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, init_std=0.05,
                    moe=MoeConfig(experts=3, top_k=2, d_expert=8, d_shared=12, dense_layers=(1,)))


def declared(params) -> dict[str, tuple[int, ...]]:
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    cfg = PRESETS[name]
    assert declared(abstract_params(cfg)) == param_shapes(cfg)


@pytest.mark.parametrize("head", ["lm", "score", "reward"])
@pytest.mark.parametrize("stacked", [True, False])
def test_heads_and_layouts(head, stacked):
    cfg = dataclasses.replace(SMALL, head=head, labels=3)
    params = abstract_params(cfg, stacked=stacked)
    assert declared(params) == param_shapes(cfg, stacked=stacked)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_initial_values():
    """Matrices of the configured spread, biases 0, scales 1; one draw for both layouts, which turn into each other."""
    params = init_params(SMALL, jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            assert not leaf.any(), name
        elif "scale" in name:
            assert (leaf == 1).all(), name
        else:
            # Over n draws the measured spread strays by 1/sqrt(2n) of itself; five times that is never met.
            assert abs(leaf.std() / 0.05 - 1) < 5 / np.sqrt(2 * leaf.size), name
    flat = unstack(params, SMALL)
    jax.tree.map(np.testing.assert_array_equal, flat, init_params(SMALL, jax.random.key(0), stacked=False))
    jax.tree.map(np.testing.assert_array_equal, stack(flat, SMALL), params)
    assert unstack(flat, SMALL) is flat and stack(params, SMALL) is params
    other = init_params(SMALL, jax.random.key(1))
    assert not np.array_equal(params["embed"]["table"], other["embed"]["table"])
    gate = params["layers_2"]["moe"]["gate"]
    assert not np.array_equal(gate[0], gate[1]) and not np.array_equal(gate[0, 0], gate[0, 1])
