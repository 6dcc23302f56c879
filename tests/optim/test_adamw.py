"""What decays, the clip, float32 weights, refusals; the arithmetic is compared in test_adamw_torch.py."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.optim.adamw import AdamWConfig, decays, make_optimizer


def config(**changes) -> AdamWConfig:
    return AdamWConfig(**(dict(peak=1.0, steps=100, warmup=10, final=0.1) | changes))


TREE = {
    "embed": {"table": jnp.ones((3, 2))},
    "layers_0": {"attn_norm": {"scale": jnp.ones((2, 2))},
                 "attn": {"q": jnp.ones((2, 2, 2)), "q_bias": jnp.ones((2, 2))},
                 "moe": {"router": jnp.ones((2, 3, 2)), "shared_router": jnp.ones((2, 1, 2)),
                         "gate": jnp.ones((2, 3, 4, 2))}},
    "reward": {"dense1": jnp.ones((2, 2)), "dense1_bias": jnp.ones((2,))},
    "norm": {"scale": jnp.ones((2,))},
}


def test_only_matrices_decay():
    cfg = config(peak=0.5, warmup=0, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(cfg)
    zero = jax.tree.map(jnp.zeros_like, TREE)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(TREE), TREE)
    exempt = {"scale", "q_bias", "dense1_bias"}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        np.testing.assert_allclose(update, 0.0 if path[-1].key in exempt else -0.5 * 0.2, rtol=1e-6, err_msg=str(path))
    assert jax.tree.structure(decays(TREE)) == jax.tree.structure(TREE)


def test_a_parameter_without_logical_axes_is_not_guessed_at():
    with pytest.raises(ValueError, match=r"no logical axes are known of a parameter layers_0/attn/w"):
        decays({"layers_0": {"attn": {"w": jnp.ones((2, 2))}}})


def test_clip_scales_the_whole_gradient():
    params = {"embed": {"table": jnp.zeros((1, 2))}, "norm": {"scale": jnp.zeros((1,))}}
    gradient = {"embed": {"table": jnp.array([[3.0, 0.0]])}, "norm": {"scale": jnp.array([4.0])}}
    optimizer = make_optimizer(config(clip=1.0, b1=0.0, warmup=0))
    _, state = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(params), params)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(mu["embed"]["table"], [[0.6, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(mu["norm"]["scale"], [0.8], rtol=1e-6)


def test_weights_that_are_not_float32_are_refused():
    narrow = {"norm": {"scale": jnp.ones((2,), jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"float32, found bfloat16 at \['norm'\]\['scale'\]"):
        make_optimizer(config()).init(narrow)


REFUSED = {"eps": (math.nan, "eps"), "weight_decay": (-0.1, "weight_decay"), "b1": (1.0, "b1"), "b2": (math.nan, "b2"),
           "clip": (0.0, "clip"), "moments": ("float16", "moments 'float16' is not supported: float32, bfloat16 are"),
           "peak": (math.inf, "peak")}


@pytest.mark.parametrize("field", REFUSED)
def test_refusals_name_the_field(field):
    value, message = REFUSED[field]
    with pytest.raises(UserError, match=message):
        config(**{field: value})
