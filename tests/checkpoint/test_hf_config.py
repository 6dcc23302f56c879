"""config.json → ModelConfig → config.json: meaning, refusals, and that bad input gives a UserError and nothing else."""

import copy
import dataclasses
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_jax.checkpoint.hf_config import from_hf, generation_config, read_config, to_hf
from qwen2_jax.config import DualChunkConfig, ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.errors import UserError

DENSE = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 3, "eos_token_id": 4,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 256, "max_window_layers": 2, "model_type": "qwen2", "num_attention_heads": 4,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "sliding_window": 16, "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.40.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 100,
}
MOE = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24, "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01, "decoder_sparse_step": 2, "mlp_only_layers": [3], "output_router_logits": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CHUNK = {"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 64}
VALID = {
    "dense": DENSE,
    "moe": MOE,
    "yarn": DENSE | {"rope_scaling": YARN},
    "window": DENSE | {"use_sliding_window": True},
    "layer types": DENSE | {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 4]},
    "score": DENSE | {"architectures": ["Qwen2ForSequenceClassification"],
                      "id2label": {"0": "bad", "1": "so", "2": "good"}},
    "reward": DENSE | {"architectures": ["Qwen2ForRewardModel"], "auto_map": {"AutoModel": "m.Qwen2ForRewardModel"}},
    "chunked": DENSE | {"dual_chunk_attention_config": CHUNK},
    "parameters": {key: value for key, value in DENSE.items() if key not in ("rope_theta", "torch_dtype")}
    | {"rope_parameters": YARN | {"rope_theta": 5000.0}, "dtype": "bfloat16", "eos_token_id": [4, 5]},
}


def without(config: dict, *names: str) -> dict:
    return {key: value for key, value in config.items() if key not in names}


@pytest.mark.smoke
def test_every_field_of_a_dense_model_arrives():
    assert from_hf(DENSE) == ModelConfig(
        vocab=100, layers=5, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, tied=True, norm_eps=1e-5,
        rope=RopeConfig(theta=5000.0), max_position=256,
        window=WindowConfig(enabled=False, size=16, max_window_layers=2), init_std=0.02, bos_id=3,
        eos_ids=(4,), dtype="float32")


def test_every_field_of_a_sparse_model_arrives():
    cfg = from_hf(MOE)
    assert cfg.moe == MoeConfig(experts=6, top_k=2, d_expert=8, d_shared=24, norm_topk_prob=True, aux_loss_coef=0.01,
                                sparse_step=2, dense_layers=(3,))
    # Layers 1 and 3 are every second one, and 3 is named as dense.
    assert [cfg.is_sparse(i) for i in range(5)] == [False, True, False, False, False]


@pytest.mark.parametrize("name", VALID)
def test_reading_leaves_its_input_alone_and_what_is_written_is_read_back(name):
    config = copy.deepcopy(VALID[name])
    cfg = from_hf(config)
    assert config == VALID[name]
    assert from_hf(json.loads(json.dumps(to_hf(cfg), allow_nan=False))) == cfg


def test_heads():
    score = from_hf(VALID["score"])
    assert (score.head, score.labels, score.label_names) == ("score", 3, ("bad", "so", "good"))
    assert to_hf(score)["id2label"] == {"0": "bad", "1": "so", "2": "good"}
    assert to_hf(score)["label2id"] == {"bad": 0, "so": 1, "good": 2}
    unnamed = DENSE | {"architectures": ["Qwen2ForSequenceClassification"]}
    assert from_hf(unnamed).labels == 2      # transformers' default, which it does not write
    assert from_hf(unnamed | {"num_labels": 1}).labels == 1
    assert to_hf(from_hf(unnamed | {"num_labels": 1}))["id2label"] == {"0": "LABEL_0"}
    reward = to_hf(from_hf(VALID["reward"]))
    assert reward["architectures"] == ["Qwen2ForRewardModel"]
    assert reward["auto_map"]["AutoModel"] == "modeling_qwen2_rm.Qwen2ForRewardModel"
    # A bare decoder with tied embeddings has its vocabulary head in them.
    assert from_hf(DENSE | {"architectures": ["Qwen2Model"]}) == from_hf(DENSE)
    assert from_hf(without(DENSE, "architectures")) == from_hf(DENSE) == from_hf(DENSE | {"architectures": None})


def test_head_dim_apart_from_the_width():
    cfg = from_hf(DENSE | {"head_dim": 6})
    assert cfg.head_dim == 6
    assert to_hf(cfg)["head_dim"] == 6
    assert "head_dim" not in to_hf(from_hf(DENSE | {"head_dim": 8}))
    assert from_hf(DENSE | {"num_attention_heads": 6, "head_dim": 10}).head_dim == 10
    assert from_hf(DENSE | {"num_key_value_heads": None}).kv_heads == 4


@pytest.mark.parametrize(("changes", "windowed"), [
    ({}, []),
    ({"use_sliding_window": True}, [2, 3, 4]),
    ({"use_sliding_window": True, "sliding_window": None}, []),
    ({"use_sliding_window": True, "sliding_window": 0}, []),
    ({"use_sliding_window": True, "max_window_layers": 0}, [0, 1, 2, 3, 4]),
    ({"use_sliding_window": True, "max_window_layers": 9}, []),
    ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3}, [0, 1]),
    ({"use_sliding_window": True, "layer_types": ["full_attention"] * 5}, []),
    ({"use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"] * 5}, []),
    ({"layer_types": ["sliding_attention"] * 5}, []),
])
def test_windows_of_a_dense_model(changes, windowed):
    cfg = from_hf(DENSE | changes)
    assert [i for i, w in enumerate(cfg.windowed_layers()) if w] == windowed
    assert from_hf(to_hf(cfg)).windowed_layers() == cfg.windowed_layers()


@pytest.mark.parametrize(("changes", "windowed"), [
    ({"use_sliding_window": True, "max_window_layers": 4}, [0, 2]),
    ({"use_sliding_window": True, "max_window_layers": 5}, [0, 2, 4]),
    ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 5}, []),
    ({"use_sliding_window": True, "layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, [4]),
])
def test_windows_of_a_sparse_model(changes, windowed):
    cfg = from_hf(MOE | changes)
    assert [i for i, w in enumerate(cfg.windowed_layers()) if w] == windowed
    assert from_hf(to_hf(cfg)).windowed_layers() == cfg.windowed_layers()


def test_layer_types_that_repeat_the_rule_say_nothing():
    types = ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert from_hf(DENSE | {"use_sliding_window": True, "layer_types": types}) == from_hf(VALID["window"])
    assert to_hf(from_hf(VALID["window"]))["layer_types"] == types
    assert "layer_types" not in to_hf(from_hf(DENSE))


def test_dual_chunk_attention_is_kept():
    cfg = from_hf(VALID["chunked"])
    assert cfg.dual_chunk == DualChunkConfig(chunk_size=64, local_size=8, original_max_position=64)
    assert to_hf(cfg)["dual_chunk_attention_config"] == CHUNK


def test_dtype_in_both_spellings():
    plain = without(DENSE, "torch_dtype")
    assert from_hf(plain).dtype == "float32"
    for name in ("dtype", "torch_dtype"):
        assert from_hf(plain | {name: "bfloat16"}).dtype == "bfloat16"
        assert from_hf(plain | {name: "torch.float16"}).dtype == "float16"
    assert from_hf(plain | {"dtype": "bfloat16", "torch_dtype": None}).dtype == "bfloat16"
    written = to_hf(from_hf(plain | {"dtype": "bfloat16"}))
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("eos", [None, 4, [4, 5], [5]])
def test_stop_ids_as_number_list_or_null(eos):
    cfg = from_hf(DENSE | {"eos_token_id": eos})
    assert cfg.eos_ids == tuple([eos] if isinstance(eos, int) else eos or ())
    assert from_hf(to_hf(cfg)) == cfg
    assert generation_config(cfg).get("eos_token_id", []) == list(cfg.eos_ids)


def test_generation_config_has_both_ids_for_the_vocabulary_of_qwen2_only():
    qwen2 = DENSE | {"vocab_size": 151936, "bos_token_id": 151643}
    expected = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
    for eos in (151643, 151645, [151645, 151643], None):
        assert generation_config(from_hf(qwen2 | {"eos_token_id": eos})) == expected
    other = generation_config(from_hf(qwen2 | {"eos_token_id": 7}))
    assert other["eos_token_id"] == [7]
    assert generation_config(from_hf(DENSE | {"pad_token_id": 9})) == {
        "bos_token_id": 3, "eos_token_id": [4], "pad_token_id": 9}


def test_what_has_no_effect_is_said_in_one_line(caplog):
    strange = {"attention_dropout": 0.1, "new_null": None, "new_false": False, "odd": 1, "eos_token_id": 100}
    with caplog.at_level(logging.WARNING):
        cfg = from_hf(DENSE | strange, ignore=["odd"], where="folder/config.json")
    assert cfg == dataclasses.replace(from_hf(DENSE), eos_ids=(100,))
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert message.startswith("folder/config.json: ")
    for part in ("attention_dropout acts in training only", "unknown field new_null (null)",
                 "unknown field new_false (false)", "odd is ignored", "id 100 lies outside vocab_size 100"):
        assert part in message


def test_known_fields_without_effect_are_passed_over_in_silence(caplog):
    inert = {"use_cache": False, "_name_or_path": "x", "output_attentions": True, "temperature": 0.7,
             "use_mrope": False, "quantization_config": None, "is_causal": True, "label2id": {"a": 0},
             "unsloth_version": "2024.9"}
    with caplog.at_level(logging.WARNING):
        assert from_hf(DENSE | inert) == from_hf(DENSE)
    assert not caplog.records


REFUSALS = [
    ({"model_type": "qwen3", "attention_bias": True}, r'model_type is "qwen3"; supported: qwen2, qwen2_moe'),
    ({"model_type": ["qwen2"]}, r"model_type must be a string"),
    ({"hidden_act": "gelu"}, r'hidden_act is "gelu"; supported: silu'),
    ({"architectures": ["Qwen2ForTokenClassification"]}, r"architectures is .*supported: .*Qwen2ForCausalLM"),
    ({"architectures": ["Qwen2MoeForCausalLM"]}, r"architectures"),
    ({"architectures": ["Qwen2ForCausalLM", "Qwen2Model"]}, r"architectures"),
    ({"architectures": "Qwen2ForCausalLM"}, r"architectures must be a list of strings"),
    ({"architectures": ["Qwen2Model"], "tie_word_embeddings": False}, r"has no head"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}}, r"auto_map is .*is not run"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r'quantization_config is .*"gptq".*unquantised'),
    ({"use_mrope": True}, r"use_mrope is true"),
    ({"use_mrope": 0}, r"use_mrope is 0"),
    ({"is_causal": False}, r"is_causal is false"),
    ({"is_causal": None}, r"is_causal is null"),
    ({"qkv_bias": False}, r"qkv_bias is false"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5"),
    ({"num_attention_heads": 3}, r"hidden_size 32 is not a multiple of num_attention_heads 3"),
    ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"num_attention_heads": 0}, r"num_attention_heads 0"),
    ({"head_dim": 7}, r"head_dim must be even"),
    ({"hidden_size": "32"}, r'hidden_size must be a whole number, found "32"'),
    ({"hidden_size": 32.0}, r"hidden_size must be a whole number, found 32.0"),
    ({"num_hidden_layers": True}, r"num_hidden_layers must be a whole number, found true"),
    ({"num_hidden_layers": -1}, r"num_hidden_layers must be a positive whole number below 2\*\*31, found -1"),
    ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 10000"),
    ({"vocab_size": 0}, r"vocab_size must be a positive whole number"),
    ({"vocab_size": 2**31}, r"vocab_size must be a positive whole number below"),
    ({"intermediate_size": 10**30}, r"intermediate_size must be a whole number"),
    ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a finite number, found NaN"),
    ({"rms_norm_eps": -1e-6}, r"rms_norm_eps must be a number of at least 0"),
    ({"rope_theta": "1e6"}, r'rope_theta must be a finite number, found "1e6"'),
    ({"rope_theta": 0}, r"rope_theta must be a positive number"),
    ({"initializer_range": float("inf")}, r"initializer_range must be a finite number"),
    ({"attention_dropout": "none"}, r"attention_dropout must be a finite number"),
    ({"tie_word_embeddings": 1}, r"tie_word_embeddings must be true or false, found 1"),
    ({"torch_dtype": "float8_e4m3fn"}, r"dtype 'float8_e4m3fn' is not supported: float32, bfloat16, float16"),
    ({"dtype": "bfloat16"}, r'dtype is "bfloat16" but torch_dtype is "float32"; make them equal'),
    ({"eos_token_id": True}, r"eos_token_id is true"),
    ({"eos_token_id": [1, "2"]}, r"eos_token_id"),
    ({"pad_token_id": -1}, r"pad_token_id is -1"),
    ({"sliding_window": -4}, r"sliding_window must not be negative"),
    ({"max_window_layers": -1}, r"max_window_layers must not be negative"),
    ({"use_sliding_window": "yes"}, r"use_sliding_window must be true or false"),
    ({"layer_types": ["full_attention"] * 4}, r"layer_types has 4 entries for num_hidden_layers 5"),
    ({"layer_types": ["full_attention"] * 4 + ["chunked_attention"]}, r"layer_types entry 'chunked_attention'"),
    ({"dual_chunk_attention_config": CHUNK | {"local_size": 64}}, r"local_size must be below chunk_size"),
    ({"dual_chunk_attention_config": without(CHUNK, "chunk_size")}, r"attention_config.chunk_size is missing"),
    ({"dual_chunk_attention_config": CHUNK | {"sparse_attention": True}}, r"config.sparse_attention is true"),
    ({"num_experts": 8}, r"unknown field num_experts is 8.*--ignore-field num_experts"),
    ({"layer_scale": [0.1]}, r"unknown field layer_scale"),
    ({"layer_scale": 0}, r"unknown field layer_scale is 0,"),
    ({"layer_scale": []}, r"unknown field layer_scale is \[\],"),
    ({"two\nlines": 1}, r'unknown field "two\\nlines"'),
    ({"torch_dtype": "two\nlines"}, r"dtype 'two\\nlines'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals_name_field_finding_and_remedy(changes, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}") as caught:
        from_hf(DENSE | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_experts_per_tok": 7}, r"num_experts_per_tok 7 must lie between 1 and num_experts 6"),
    ({"num_experts": 0}, r"num_experts must be a positive"),
    ({"moe_intermediate_size": 0}, r"moe_intermediate_size"),
    ({"shared_expert_intermediate_size": None}, r"shared_expert_intermediate_size is missing"),
    ({"decoder_sparse_step": 0}, r"decoder_sparse_step must be at least 1"),
    ({"mlp_only_layers": [-1]}, r"mlp_only_layers"),
    ({"mlp_only_layers": [0.5]}, r"mlp_only_layers must be a list of whole numbers"),
    ({"router_aux_loss_coef": -1}, r"router_aux_loss_coef"),
    ({"norm_topk_prob": "no"}, r"norm_topk_prob must be true or false"),
    ({"qkv_bias": False}, r"qkv_bias is false"),
    ({"architectures": ["Qwen2ForRewardModel"]}, r"architectures"),
])
def test_refusals_of_sparse_models(changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(MOE | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"id2label": {}}, r"id2label"),
    ({"id2label": {"1": "a"}}, r"id2label"),
    ({"id2label": {"0": 1}}, r"id2label"),
    ({"id2label": {"0": "a"}, "num_labels": 2}, r"num_labels is 2 but the number of labels in id2label is 1"),
    ({"id2label": None, "num_labels": 0}, r"num_labels is 0"),
    ({"id2label": None, "num_labels": 10**12}, r"num_labels"),
])
def test_refusals_of_labels(changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(VALID["score"] | changes)


MANDATORY = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")


@pytest.mark.parametrize("name", MANDATORY)
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"{name} is missing; needed: "):
        from_hf(without(DENSE, name))


def test_what_may_be_absent_takes_transformers_default():
    least = {name: DENSE[name] for name in MANDATORY}
    cfg = from_hf(least)
    assert (cfg.tied, cfg.window.enabled, cfg.head, cfg.bos_id, cfg.eos_ids) == (False, False, "lm", None, ())
    optional = ("norm_topk_prob", "router_aux_loss_coef", "decoder_sparse_step", "mlp_only_layers")
    moe = from_hf(without(MOE, *optional)).moe
    assert moe == MoeConfig(experts=6, top_k=2, d_expert=8, d_shared=24, norm_topk_prob=False, aux_loss_coef=0.001,
                            sparse_step=1, dense_layers=())
    with pytest.raises(UserError, match="sliding_window is missing while use_sliding_window is true"):
        from_hf(least | {"use_sliding_window": True})


def test_ignoring_a_field(caplog):
    assert from_hf(DENSE | {"layer_scale": 3}, ignore=["layer_scale"]) == from_hf(DENSE)
    assert "was to be ignored" not in caplog.text
    assert from_hf(DENSE, ignore=["layer_skale"]) == from_hf(DENSE)
    assert "layer_skale was to be ignored, but is not there" in caplog.text
    assert from_hf(DENSE | {"use_mrope": True}, ignore=["use_mrope"]) == from_hf(DENSE)
    assert from_hf(DENSE | {"auto_map": {"AutoModel": "x.Y"}}, ignore=["auto_map"]) == from_hf(DENSE)
    nested = {"dual_chunk_attention_config": CHUNK | {"sparse": 1}}
    assert from_hf(DENSE | nested, ignore=["dual_chunk_attention_config.sparse"]) == from_hf(VALID["chunked"])
    with pytest.raises(UserError, match="hidden_size cannot be ignored"):
        from_hf(DENSE, ignore=["hidden_size"])
    with pytest.raises(UserError, match="unknown field b"):
        from_hf(DENSE | {"a": 1, "b": 2}, ignore=["a"])


def test_reading_a_folder_or_a_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config.json does not exist"):
        read_config(tmp_path)
    path.write_text(json.dumps(VALID["yarn"]))
    assert read_config(tmp_path) == read_config(path) == from_hf(VALID["yarn"])
    assert read_config(tmp_path, rope_when="long").rope.when == "long"
    path.write_text(json.dumps(DENSE | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r'^.*/config.json: hidden_act is "relu"'):
        read_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
        [0, -1, 2**31, 2**63, 10**400, 1e308, "yarn", "linear", "qwen2_moe", "sliding_attention", "float16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=6)
NESTED_OR_RARE = {*YARN, *CHUNK, "attention_factor", "beta_fast", "mscale", "head_dim", "num_labels", "is_causal"}
FIELDS = sorted({name for config in VALID.values() for name in config} | NESTED_OR_RARE)


@st.composite
def mutated(draw) -> object:
    """A valid configuration in which some values, at the top or one level down, are replaced, removed or added."""
    config = copy.deepcopy(VALID[draw(st.sampled_from(sorted(VALID)))])
    for _ in range(draw(st.integers(1, 3))):
        nested = [value for value in config.values() if isinstance(value, dict)]
        target = draw(st.sampled_from([config, *nested]))
        name = draw(st.sampled_from(sorted(target)) | st.sampled_from(FIELDS) | st.text(max_size=5)) if target else "x"
        if draw(st.booleans()):
            target[name] = draw(JSON)
        else:
            target.pop(name, None)
    return config


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated() | JSON)
def test_any_mutation_is_read_or_refused(config):
    try:
        cfg = from_hf(config)  # pyright: ignore[reportArgumentType]
    except UserError as error:
        assert str(error).startswith("config.json: ")
        assert "\n" not in str(error)
        return
    assert from_hf(json.loads(json.dumps(to_hf(cfg), allow_nan=False))) == cfg
    assert len(cfg.windowed_layers()) == cfg.layers


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_file_is_read_or_refused(tmp_path, data):
    content = bytearray(json.dumps(VALID["yarn"]).encode())
    start = data.draw(st.integers(0, len(content)))
    content[start:start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=6))
    (tmp_path / "config.json").write_bytes(content)
    try:
        read_config(tmp_path)
    except UserError as error:
        assert "config.json" in str(error)
