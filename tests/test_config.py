"""What the dataclasses refuse by themselves, whoever builds them, and the rules they state."""

import dataclasses
import math

import pytest

from qwen2_jax.config import LayerRun, ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.errors import UserError

CFG = ModelConfig(vocab=50, layers=6, d_model=12, d_ff=20, heads=4, kv_heads=2, head_dim=6, tied=True, norm_eps=1e-6,
                  rope=RopeConfig(theta=1e4), max_position=64)
MOE = MoeConfig(experts=5, top_k=2, d_expert=7, d_shared=9)

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": 0}, "num_hidden_layers"), ({"layers": True}, "num_hidden_layers"), ({"vocab": 2.0}, "vocab_size"),
    ({"kv_heads": 3}, "not a multiple of num_key_value_heads 3"), ({"head_dim": 5}, "head_dim must be even"),
    ({"norm_eps": math.nan}, "rms_norm_eps"), ({"init_std": math.inf}, "initializer_range"),
    ({"head": "x"}, "head 'x'"),
    ({"dtype": "int8"}, "dtype 'int8'"), ({"label_names": ("a", "b")}, "id2label names 2 labels"),
    ({"window": WindowConfig(layer_types=("full_attention",))}, "layer_types has 1 entries for num_hidden_layers 6"),
])
def test_a_model_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CFG, **change)


@pytest.mark.parametrize(("change", "message"), [
    ({"theta": math.nan}, "rope_theta"), ({"kind": "dynamic"}, "rope_type 'dynamic'"), ({"when": "never"}, "rope_when"),
    ({"kind": "linear", "factor": math.nan}, "rope factor"), ({"kind": "yarn", "factor": 2.0}, "original_max_position"),
    ({"kind": "yarn", "factor": 2.0, "original_max_position": 8, "beta_slow": 0.0}, "beta_slow"),
])
def test_a_rotary_embedding_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        RopeConfig(**{"theta": 1e4} | change)


def test_runs_of_equal_layers():
    moe = dataclasses.replace(CFG, moe=dataclasses.replace(MOE, dense_layers=(0, 3, 4)))
    assert moe.layer_runs() == (
        LayerRun(0, 1, False), LayerRun(1, 2, True), LayerRun(3, 2, False), LayerRun(5, 1, True))
    assert [run.name for run in moe.layer_runs()] == ["layers_0", "layers_1", "layers_3", "layers_5"]
    assert moe.layer_runs(stacked=False) == tuple(LayerRun(i, 1, i in (1, 2, 5)) for i in range(6))
    assert CFG.layer_runs() == (LayerRun(0, 6, False),)


def test_stop_ids():
    assert CFG.stop_ids == ()
    assert dataclasses.replace(CFG, eos_ids=(7,)).stop_ids == (7,)
    qwen2 = dataclasses.replace(CFG, vocab=151936, eos_ids=(151643,))
    assert qwen2.stop_ids == (151645, 151643)
    assert dataclasses.replace(qwen2, eos_ids=(7,)).stop_ids == (7,)
    assert dataclasses.replace(qwen2, vocab=160000).stop_ids == (151643,)
