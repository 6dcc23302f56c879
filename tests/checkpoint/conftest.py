"""Tiny Hugging Face checkpoints with true shapes of every kind, written by transformers where it knows the kind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=3)
MIXED = dict(SMALL, num_hidden_layers=5, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
             shared_expert_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[1])
KINDS = ("dense", "tied", "moe", "mixed", "score", "reward")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """`hf_folder("moe")`: a checkpoint folder in bfloat16, biases and norms away from their initial values."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("hf") / kind
            _save(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def tensors():
    """`tensors(folder)`: name → bytes, dtype and shape of every tensor in a folder, read by the safetensors library."""
    from safetensors import safe_open

    def read(folder: Path) -> dict[str, tuple[bytes, str, tuple[int, ...]]]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as f:
                for name in f.keys():
                    array = f.get_tensor(name)
                    assert name not in found
                    found[name] = (array.tobytes(), array.dtype.name, array.shape)
        return found

    return read


def _save(kind: str, folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    if kind in ("moe", "mixed"):
        extra = {"mlp_only_layers": []} if kind == "moe" else {}
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**MIXED | extra))
    elif kind == "score":
        model = transformers.Qwen2ForSequenceClassification(
            transformers.Qwen2Config(**SMALL, num_labels=3, tie_word_embeddings=False))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, tie_word_embeddings=kind == "tied"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    if kind == "reward":
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        for name, shape in (("0.weight", (32, 32)), ("0.bias", (32,)), ("2.weight", (1, 32)), ("2.bias", (1,))):
            state[f"score.{name}"] = torch.randn(shape).to(torch.bfloat16)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen2ForRewardModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"a file": name}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not copied")


@pytest.fixture
def rewrite():
    """`rewrite(folder, change)`: a folder's one safetensors file again, after `change(tensors)` on its numpy arrays."""
    from safetensors.numpy import load_file, save_file

    def apply(folder: Path, change) -> None:
        file = folder / "model.safetensors"
        arrays = {name: np.array(array) for name, array in load_file(file).items()}
        change(arrays)
        save_file(arrays, file, {"format": "pt"})

    return apply


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)
