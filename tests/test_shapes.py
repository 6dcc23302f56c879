"""Shapes and counts against the modules of transformers, and between the two layouts."""

import dataclasses
import math

import pytest

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig
from qwen2_jax.shapes import count_params, logical_axes, param_shapes

DENSE = ModelConfig(vocab=50, layers=4, d_model=12, d_ff=20, heads=3, kv_heads=1, head_dim=6, tied=True, norm_eps=1e-6,
                    rope=RopeConfig(theta=1e4), max_position=64)
MOE = dataclasses.replace(DENSE, tied=False, moe=MoeConfig(experts=5, top_k=2, d_expert=7, d_shared=9, sparse_step=2,
                                                           dense_layers=(3,)))
ALL = {
    "tied": DENSE,
    "untied": dataclasses.replace(DENSE, tied=False),
    "moe": MOE,
    "score": dataclasses.replace(DENSE, head="score", labels=3),
    "score, moe": dataclasses.replace(MOE, head="score", labels=1),
    "reward": dataclasses.replace(DENSE, tied=False, head="reward"),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in ALL if name != "reward"])
def test_counts_equal_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from qwen2_jax.checkpoint.hf_config import to_hf

    fields = to_hf(ALL[name])
    hf = transformers.AutoConfig.for_model(**{key: value for key, value in fields.items() if key != "rope_scaling"})
    with torch.device("meta"):
        model = getattr(transformers, fields["architectures"][0])(hf)
    count = count_params(ALL[name])
    assert count.total == sum(p.numel() for p in model.parameters())
    tables = [model.model.embed_tokens, *([model.lm_head] if hasattr(model, "lm_head") else [])]
    embeddings = {id(table.weight): table.weight.numel() for table in tables}   # a tied one counts once
    assert count.total - count.non_embedding == sum(embeddings.values())


def test_the_reward_head_has_two_layers_with_biases_and_no_vocabulary_head():
    shapes = param_shapes(ALL["reward"])
    assert {path: shape for path, shape in shapes.items() if path.startswith(("reward", "head"))} == {
        "reward/dense1": (12, 12), "reward/dense1_bias": (12,), "reward/dense2": (1, 12), "reward/dense2_bias": (1,)}


def test_runs_of_equal_layers_share_a_stack():
    shapes = param_shapes(MOE)
    stacks = {path.split("/")[0]: shape[0] for path, shape in shapes.items() if path.startswith("layers_")}
    assert stacks == {"layers_0": 1, "layers_1": 1, "layers_2": 2}
    assert shapes["layers_2/mlp/down"] == (2, 12, 20)
    assert shapes["layers_1/moe/gate"] == (1, 5, 7, 12)
    assert shapes["layers_1/moe/down"] == (1, 5, 12, 7)
    assert shapes["layers_0/attn/q"] == (1, 18, 12)
    assert shapes["layers_0/attn/k_bias"] == (1, 6)
    assert shapes["layers_0/attn/o"] == (1, 12, 18)
    assert "layers_1/mlp/gate" not in shapes


@pytest.mark.parametrize("name", ALL)
def test_both_layouts_hold_the_same_parameters(name):
    stacked, single = (param_shapes(ALL[name], stacked=flag) for flag in (True, False))
    assert sum(map(math.prod, stacked.values())) == sum(map(math.prod, single.values()))
    assert {path.split("/")[0] for path in single if path.startswith("layers_")} == {f"layers_{i}" for i in range(4)}
    assert all(shape[0] == 1 for path, shape in single.items() if path.startswith("layers_"))


def test_active_parameters_leave_out_the_experts_that_are_not_chosen():
    count = count_params(MOE)
    assert count.total - count.active == 3 * 3 * 7 * 12      # one sparse layer, 3 idle experts of 3 matrices
    assert count.non_embedding - count.active_non_embedding == 3 * 3 * 7 * 12
    assert count_params(DENSE).active == count_params(DENSE).total


@pytest.mark.parametrize("name", ALL)
def test_logical_axes_are_those_that_the_modules_declare(name):
    import jax
    from flax import linen as nn

    from qwen2_jax.model.decoder import Decoder

    ids = jax.ShapeDtypeStruct((1, 1), "int32")
    declared = jax.eval_shape(lambda ids: Decoder(ALL[name]).init(jax.random.key(0), ids)["params"], ids)
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    found = {"/".join(part.key for part in path): leaf.names for path, leaf in leaves}
    assert {path: logical_axes(path) for path in param_shapes(ALL[name])} == found
