"""`qwen2-jax info`: numbers, both forms of output, refusals."""

import argparse
import json

import pytest

from qwen2_jax.checkpoint.hf_config import to_hf
from qwen2_jax.cli import info
from qwen2_jax.errors import UserError
from qwen2_jax.presets import PRESETS

TINY = {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 64,
    "model_type": "qwen2_moe", "num_attention_heads": 2, "num_hidden_layers": 4, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 10, "eos_token_id": 9, "torch_dtype": "float16",
    "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 3, "shared_expert_intermediate_size": 4, "decoder_sparse_step": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    info.add_parser(parser.add_subparsers())
    args = parser.parse_args(["info", *argv])
    return args.run(args)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.mark.smoke
def test_a_preset_as_json(capsys):
    assert run("qwen/qwen2-57b-a14b-instruct", "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == ""
    assert facts["name"] == "Qwen2-57B-A14B-Instruct"
    assert facts["parameters"] == {"total": 57_408_658_944, "non_embedding": 56_319_581_696, "active": 14_249_270_784,
                                   "active_non_embedding": 13_160_193_536}
    assert facts["weight_bytes"] == {"float32": 229_634_635_776, "bfloat16": 114_817_317_888, "int8": 57_408_658_944}
    assert facts["kv_cache_bytes_per_token"] == {"float32": 114_688, "bfloat16": 57_344}
    assert facts["context"] == {"max_position": 32768, "longest": 32768}
    assert facts["stop_ids"] == [151645, 151643]
    assert facts["windowed_layers"] == []
    assert facts["sparse_layers"] == list(range(28))
    assert facts["config"] == to_hf(PRESETS["Qwen2-57B-A14B-Instruct"])


def test_a_folder_as_json(folder, capsys):
    assert run(str(folder), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    # By hand. Attention and norms: q 8*8+8, k and v (4*8+4) each, o 8*8, two norms of 8: 224. Dense: 3*12*8 = 288.
    # Sparse: router 6*8, six experts of 3*3*8, shared 3*4*8 and 8: 584. Embedding and head 2*80, last norm 8.
    total = 4 * 224 + 2 * 288 + 2 * 584 + 160 + 8
    assert facts["parameters"] == {"total": total, "non_embedding": total - 160, "active": total - 2 * 4 * 72,
                                   "active_non_embedding": total - 160 - 2 * 4 * 72}
    assert facts["kv_cache_bytes_per_token"]["bfloat16"] == 2 * 4 * 1 * 4 * 2
    assert (facts["windowed_layers"], facts["sparse_layers"], facts["stop_ids"]) == ([0, 2], [1, 3], [9])


def test_a_folder_as_text(folder, capsys):
    assert run(str(folder)) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    lines = {label: text.strip() for label, text in lines.items()}
    assert lines["model"] == f"{folder} (Qwen2MoeForCausalLM, stored in float16)"
    assert lines["experts"] == "2 of 6 of width 3, and a shared one of width 4, in layers 1, 3"
    assert lines["layers"] == "4 of width 8, feed-forward 12"
    assert lines["window"] == "5 tokens in layers 0, 2"
    assert lines["rope"] == "yarn, theta 10,000, factor 4, original length 16"
    assert lines["context"] == "64 tokens"
    assert lines["weights bfloat16"] == "5,616 bytes (0.00 GiB)"


@pytest.mark.parametrize(("name", "lines"), [
    ("Qwen2-0.5B", ["vocabulary        151,936, embeddings tied", "window            none, full attention",
                    "rope              default, theta 1,000,000"]),
    ("Qwen2.5-7B-Instruct-1M", ["context           262,144 tokens, one chunk of dual chunk attention; "
                                "1,010,000 in config.json"]),
    ("Qwen2-57B-A14B", ["experts           8 of 64 of width 2,560, and a shared one of width 20,480, in layers 0-27",
                        "layers            28 of width 3,584"]),
])
def test_a_preset_as_text(name, lines, capsys):
    assert run(name) == 0
    assert set(lines) <= set(capsys.readouterr().out.splitlines())


def test_labels_are_named(tmp_path, capsys):
    labels = {"architectures": ["Qwen2MoeForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
    (tmp_path / "config.json").write_text(json.dumps(TINY | labels))
    run(str(tmp_path))
    assert "bad, good" in capsys.readouterr().out


def test_the_installed_command(folder, run_cli):
    done = run_cli("info", "Qwen2-0.5B", "--json")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["parameters"]["total"]) == (0, "", 494_032_768)
    (folder / "config.json").write_text(json.dumps(TINY | {"hidden_act": "gelu", "novelty": None}))
    done = run_cli("info", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f'qwen2-jax: error: {folder}/config.json: hidden_act is "gelu"; supported: silu or swish\n')
    (folder / "config.json").write_text(json.dumps(TINY | {"novelty": None}))
    done = run_cli("info", folder)
    assert (done.returncode, done.stderr) == (
        0, f"qwen2-jax: {folder}/config.json: unknown field novelty (null) has no effect\n")


def test_refusals(folder, capsys):
    with pytest.raises(UserError, match=r"'Qwen2-7X' is neither a folder nor .* model; did you mean .*Qwen2-7B,"):
        run("Qwen2-7X")
    with pytest.raises(UserError, match=r"config.json does not exist; a folder with a .*config.json is needed"):
        run(str(folder.parent))
    (folder / "config.json").write_text(json.dumps(TINY | {"novelty": 2}))
    with pytest.raises(UserError, match=r"unknown field novelty is 2.*--ignore-field novelty"):
        run(str(folder))
    assert run(str(folder), "--ignore-field", "novelty") == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="/dev/null is no regular file"):
        run("/dev/null")
    with pytest.raises(UserError, match="'' is neither a folder nor a published model"):
        run("")
