"""config.json against both majors of transformers: what they write is read, what we write they read alike."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_jax.checkpoint.hf_config import read_config, to_hf
from qwen2_jax.config import ModelConfig
from qwen2_jax.presets import PRESETS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 5, "max_position_embeddings": 256, "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
TINY_MOE = TINY | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                   "shared_expert_intermediate_size": 24}


def save(path: Path, *, moe: bool, **fields):
    hf = (transformers.Qwen2MoeConfig if moe else transformers.Qwen2Config)(**(TINY_MOE if moe else TINY) | fields)
    hf.save_pretrained(path)
    return hf


def write(path: Path, cfg: ModelConfig) -> Path:
    path.mkdir(exist_ok=True, parents=True)
    (path / "config.json").write_text(json.dumps(to_hf(cfg)))
    return path


def numbers(cfg: ModelConfig) -> dict:
    """What any reader of a file must find, from our side."""
    out = {
        "vocab_size": cfg.vocab, "hidden_size": cfg.d_model, "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim, "max_position_embeddings": cfg.max_position, "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied, "initializer_range": cfg.init_std, "dtype": cfg.dtype,
        "bos_token_id": cfg.bos_id, "pad_token_id": cfg.pad_id, "eos_token_ids": list(cfg.eos_ids),
        "hidden_act": "silu", "windowed": list(cfg.windowed_layers()),
        "window": cfg.window.size if any(cfg.windowed_layers()) else None,
        "rope": {"theta": cfg.rope.theta, "kind": cfg.rope.kind},
        "labels": cfg.labels if cfg.head == "score" else 2,
        "sparse": [cfg.is_sparse(i) for i in range(cfg.layers)],
    }
    if cfg.rope.kind != "default":
        out["rope"]["factor"] = cfg.rope.factor
    if cfg.rope.kind == "yarn":
        rope = cfg.rope
        out["rope"] |= {
            "original_max_position_embeddings": rope.original_max_position, "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim, "truncate": rope.truncate}
    if cfg.moe is not None:
        out |= {"num_experts": cfg.moe.experts, "num_experts_per_tok": cfg.moe.top_k,
                "moe_intermediate_size": cfg.moe.d_expert, "shared_expert_intermediate_size": cfg.moe.d_shared,
                "norm_topk_prob": cfg.moe.norm_topk_prob, "router_aux_loss_coef": cfg.moe.aux_loss_coef}
    return out


# The same from a configuration object of transformers; as text, since it also runs in another interpreter.
NUMBERS_OF = '''
def numbers_of(hf):
    same = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range bos_token_id pad_token_id "
            "hidden_act num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
            "norm_topk_prob router_aux_loss_coef").split()
    out = {name: getattr(hf, name) for name in same if hasattr(hf, name)}
    out["head_dim"] = getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads)
    out["dtype"] = str(hf.dtype).removeprefix("torch.") if hf.dtype is not None else "float32"
    eos = hf.eos_token_id
    out["eos_token_ids"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    active = bool(hf.use_sliding_window and hf.sliding_window)
    types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    out["windowed"] = [active and kind == "sliding_attention" for kind in types]
    out["window"] = hf.sliding_window if any(out["windowed"]) else None
    scaling = getattr(hf, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", "default")
    out["rope"] = {"theta": scaling["rope_theta"] if "rope_theta" in scaling else hf.rope_theta, "kind": kind}
    if kind != "default":
        out["rope"]["factor"] = scaling["factor"]
    if kind == "yarn":
        out["rope"] |= {
            "original_max_position_embeddings": scaling["original_max_position_embeddings"],
            "beta_fast": scaling.get("beta_fast") or 32, "beta_slow": scaling.get("beta_slow") or 1,
            "attention_factor": scaling.get("attention_factor"), "mscale": scaling.get("mscale"),
            "mscale_all_dim": scaling.get("mscale_all_dim"), "truncate": scaling.get("truncate", True)}
    out["labels"] = hf.num_labels
    step, dense = getattr(hf, "decoder_sparse_step", 1), getattr(hf, "mlp_only_layers", [])
    out["sparse"] = [hasattr(hf, "num_experts") and i not in dense and (i + 1) % step == 0
                     for i in range(hf.num_hidden_layers)]
    return out
'''
namespace: dict = {}
exec(NUMBERS_OF, namespace)
numbers_of = namespace["numbers_of"]

CASES = {
    "dense": (False, {}),
    "untied, ids, dtype": (False, {"tie_word_embeddings": True, "eos_token_id": [5, 6], "bos_token_id": 1,
                                   "pad_token_id": 2, "dtype": "bfloat16"}),
    "head_dim": (False, {"head_dim": 16}),
    "yarn": (False, {"rope_parameters": YARN}),
    "yarn, all fields": (False, {"rope_parameters": YARN | {
        "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "truncate": False}}),
    "linear": (False, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "window": (False, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    "layer types": (False, {"use_sliding_window": True, "sliding_window": 16,
                            "layer_types": ["sliding_attention", *["full_attention"] * 4]}),
    "moe": (True, {}),
    "moe, some dense": (True, {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True,
                               "router_aux_loss_coef": 0.01}),
    "moe, yarn": (True, {"rope_parameters": YARN}),
    "two labels": (False, {"num_labels": 2, "architectures": ["Qwen2ForSequenceClassification"]}),
    "named labels": (False, {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2},
                             "architectures": ["Qwen2ForSequenceClassification"]}),
    "one label, moe": (True, {"num_labels": 1, "architectures": ["Qwen2MoeForSequenceClassification"]}),
}
# transformers 4 cannot express it: every layer of its sparse models is windowed, or none.
NEW_ONLY = {"moe, window": (True, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4})}


@pytest.mark.parametrize("case", [*CASES, *NEW_ONLY])
def test_a_file_of_transformers_5_means_the_same_here_and_after_our_writing(tmp_path, case):
    moe, fields = (CASES | NEW_ONLY)[case]
    hf = save(tmp_path / "theirs", moe=moe, **fields)
    cfg = read_config(tmp_path / "theirs")
    assert numbers(cfg) == numbers_of(hf)
    again = transformers.AutoConfig.from_pretrained(write(tmp_path / "ours", cfg))
    assert numbers_of(again) == numbers_of(hf)
    again.save_pretrained(tmp_path / "theirs again")
    assert read_config(tmp_path / "theirs again") == cfg


@pytest.mark.parametrize("case", ["dense", "yarn", "yarn, all fields", "linear"])
def test_rotary_frequencies_survive_the_round_trip(tmp_path, case):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    before = Qwen2RotaryEmbedding(save(tmp_path / "theirs", moe=False, **CASES[case][1]))
    ours = write(tmp_path / "ours", read_config(tmp_path / "theirs"))
    after = Qwen2RotaryEmbedding(transformers.AutoConfig.from_pretrained(ours))
    assert torch.equal(before.inv_freq, after.inv_freq)
    assert before.attention_scaling == after.attention_scaling


@pytest.mark.parametrize("field", ["attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
                                   "truncate", "original_max_position_embeddings"])
def test_a_null_in_yarn_means_what_transformers_takes_it_for(tmp_path, field):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    parameters = YARN | {"factor": 3.0, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0, "truncate": False}
    if field == "original_max_position_embeddings":
        del parameters[field]       # a null there is an error in transformers
    else:
        parameters[field] = None
    before = Qwen2RotaryEmbedding(save(tmp_path / "theirs", moe=False, rope_parameters=parameters))
    ours = write(tmp_path / "ours", read_config(tmp_path / "theirs"))
    after = Qwen2RotaryEmbedding(transformers.AutoConfig.from_pretrained(ours))
    assert torch.equal(before.inv_freq, after.inv_freq)
    assert before.attention_scaling == after.attention_scaling


def optional(**choices: list) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in choices.items()})


KINDS = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=5, max_size=5)
DENSE_FIELDS = optional(
    num_key_value_heads=[1, 2, 4, None], head_dim=[6, 8, 16], rms_norm_eps=[1e-5, 1e-6],
    tie_word_embeddings=[True, False],
    use_sliding_window=[True, False], sliding_window=[None, 0, 3, 4096], max_window_layers=[0, 2, 5, 28],
    attention_dropout=[0.0, 0, 0.1], initializer_range=[0.02, 0.1], use_cache=[False], hidden_act=["silu"],
    bos_token_id=[None, 0, 3], eos_token_id=[None, 7, [1, 2], []], pad_token_id=[None, 0], num_labels=[1, 2, 5],
    dtype=["float32", "bfloat16", "float16"], problem_type=["regression"], output_hidden_states=[True],
    output_attentions=[True], return_dict=[False], chunk_size_feed_forward=[2], name_or_path=["somewhere"],
    rope_parameters=[YARN, YARN | {"beta_fast": None}, YARN | {"truncate": None}, {"rope_theta": 77.0}, None,
                     {"rope_type": "linear", "factor": 2.0}],
)
MOE_FIELDS = optional(
    decoder_sparse_step=[1, 2, 7], mlp_only_layers=[None, [], [0, 4], [9]], norm_topk_prob=[True, False],
    num_experts_per_tok=[1, 6], router_aux_loss_coef=[0.0, 0.5], output_router_logits=[True], qkv_bias=[True],
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moe=st.booleans(), fields=DENSE_FIELDS, sparse=MOE_FIELDS, kinds=st.none() | KINDS)
def test_whatever_transformers_5_writes_is_read(tmp_path, moe, fields, sparse, kinds):
    if moe and fields.get("num_key_value_heads", 2) is None:
        del fields["num_key_value_heads"]       # the sparse model of transformers fails on a null
    hf = save(tmp_path / "theirs", moe=moe, **fields, **(sparse if moe else {}), layer_types=kinds)
    cfg = read_config(tmp_path / "theirs")
    ours = numbers(cfg)
    theirs = numbers_of(hf) | {"labels": ours["labels"]}     # a language model's labels mean nothing
    rope = theirs["rope"]
    if rope["kind"] == "yarn" and rope["truncate"] is None:
        rope["truncate"] = False
    assert ours == theirs
    again = numbers_of(transformers.AutoConfig.from_pretrained(write(tmp_path / "ours", cfg)))
    assert again | {"labels": ours["labels"]} == ours


def transformers_4() -> str:
    """An interpreter with transformers 4; `make test` builds one."""
    named = os.environ.get("QWEN2_JAX_TRANSFORMERS4_PYTHON")
    python = Path(named) if named else ROOT / ".venv-tf4" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no interpreter with transformers 4 at {python}; QWEN2_JAX_TRANSFORMERS4_PYTHON can name one")
    return str(python)


READ_ALL = NUMBERS_OF + '''
import json, sys
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
print(json.dumps([numbers_of(transformers.AutoConfig.from_pretrained(folder)) for folder in sys.argv[1:]]))
'''
SAVE_ALL = '''
import json, sys
import transformers
for folder in sys.argv[1:]:
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder + "/again")
'''
FOR_BOTH = ("Qwen2-0.5B", "Qwen2-72B", "Qwen2-57B-A14B-Instruct", "Qwen2-Math-RM-72B", "Qwen2.5-14B-Instruct-1M")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Path, ModelConfig]:
    """Files that we wrote, and what they mean."""
    root = tmp_path_factory.mktemp("written")
    models = {name: PRESETS[name] for name in FOR_BOTH}
    for i, (case, (moe, fields)) in enumerate(CASES.items()):
        save(root / f"theirs {i}", moe=moe, **fields)
        models[case] = read_config(root / f"theirs {i}")
    return {write(root / f"ours {i}", cfg): cfg for i, cfg in enumerate(models.values())}


def test_both_majors_of_transformers_read_the_same_numbers(folders):
    done = subprocess.run([transformers_4(), "-c", READ_ALL, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nrecognized" not in done.stderr
    for (folder, cfg), old in zip(folders.items(), json.loads(done.stdout), strict=True):
        new = numbers_of(transformers.AutoConfig.from_pretrained(folder))
        expected = json.loads(json.dumps(numbers(cfg)))
        assert new == expected
        assert old == expected


def test_whatever_transformers_4_writes_is_read(folders):
    done = subprocess.run([transformers_4(), "-c", SAVE_ALL, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, cfg in folders.items():
        assert numbers(read_config(folder / "again")) == numbers(cfg)
