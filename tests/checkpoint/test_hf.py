import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.hf import HfWriter
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.safetensors_format import read_header
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.errors import UserError


@pytest.fixture
def copy(hf_folder, tmp_path):
    """`copy("dense")`: a checkpoint folder of one's own to damage."""

    def make(kind):
        shutil.copytree(hf_folder(kind), tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def sharded(hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "sharded", to="safetensors", max_shard_size="40KB")
    return tmp_path / "sharded"


Q1 = "model.layers.1.self_attn.q_proj.weight"


def drop(arrays):
    del arrays[Q1]


def add(arrays):
    arrays["model.layers.1.self_attn.o_proj.bias"] = np.zeros(32, np.float32)


def extra_layer(arrays):
    arrays["model.layers.3.self_attn.q_proj.weight"] = arrays[Q1]


def misshape(arrays):
    arrays[Q1] = arrays[Q1].reshape(16, 64)


def quantise(arrays):
    arrays[Q1] = arrays[Q1].astype(np.int8)


def double(arrays):
    arrays[Q1] = arrays[Q1].astype(np.float64)


@pytest.mark.parametrize(("damage", "message"), [
    (drop, rf"tensor {Q1} is missing:"),
    (add, r"model\.safetensors: unexpected tensor model\.layers\.1\.self_attn\.o_proj\.bias"),
    (extra_layer, r"unexpected tensor model\.layers\.3\.self_attn\.q_proj\.weight"),
    (misshape, rf"{Q1} has shape \[16, 64\], config\.json needs \[32, 32\]"),
    (quantise, rf"{Q1} is stored as I8; only BF16, F16, F32 can be read, quantised"),
    (double, rf"{Q1} is stored as F64; only BF16, F16, F32 can be read"),
])
def test_tensors_that_are_not_those_of_the_model(damage, message, copy, rewrite, tmp_path):
    src = copy("dense")
    rewrite(src, damage)
    with pytest.raises(UserError, match=message) as error:
        convert(src, tmp_path / "dst", to="orbax")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("dst*"))


def test_several_missing_tensors_are_counted(copy, rewrite):
    src = copy("dense")

    def drop_layer(arrays):
        for name in [name for name in arrays if ".layers.2." in name]:
            del arrays[name]

    rewrite(src, drop_layer)
    with pytest.raises(UserError, match=r"model\.layers\.2\.input_layernorm\.weight is missing and 11 more"):
        open_checkpoint(src)


def test_a_truncated_file(copy, tmp_path):
    file = copy("dense") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a sound.* cut short"):
        convert(file.parent, tmp_path / "dst", to="orbax")


def test_index_that_names_an_absent_shard(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"index\.json names the shard {lost.name}, which is not in the folder"):
        open_checkpoint(sharded)


def test_index_that_places_a_tensor_in_a_shard_without_it(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"model\.norm\.weight is in {first}, which does not hold it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"), ('{"weight_map": {"a": 3}}', "a points to 3"),
    ('{"weight_map": {"a": "../model.safetensors"}}', "not the name of a file"),
    ('{"weight_map": {"a": ".."}}', "not the name of a file"),
    ('{"weight_map": {"a": "' + 256 * "x" + '"}}', "not the name of a file"),
    ('{"weight_map": {"a\\nb": "x"}}', "unprintable"),
])
def test_damaged_index(text, message, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_checkpoint(sharded)


def test_shards_without_an_index_are_joined_but_no_tensor_may_occur_twice(sharded, hf_folder, tensors, tmp_path):
    (sharded / "model.safetensors.index.json").unlink()
    convert(sharded, tmp_path / "dst", to="safetensors")
    assert tensors(tmp_path / "dst") == tensors(hf_folder("dense"))
    shutil.copy(min(sharded.glob("*.safetensors")), sharded / "again.safetensors")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is stored twice: in again"):
        open_checkpoint(sharded)


def test_pickled_weights_are_refused_with_a_way_out(copy):
    src = copy("dense")
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(src)
    (src / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds no weights"):
        open_checkpoint(src)
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        open_checkpoint(src / "config.json")


def test_no_config(copy):
    src = copy("dense")
    (src / "config.json").unlink()
    for path in (src, src / "model.safetensors"):
        with pytest.raises(UserError, match=r"no config\.json"):
            open_checkpoint(path)


def test_stored_head_of_a_tied_model(copy, rewrite, hf_folder, tensors, tmp_path):
    src = copy("tied")

    def store_head(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    rewrite(src, store_head)
    convert(src, tmp_path / "dst", to="safetensors")
    assert tensors(tmp_path / "dst") == tensors(hf_folder("tied"))

    def change_head(arrays):
        arrays["lm_head.weight"].view(np.uint16)[-1, -1] ^= 1

    rewrite(src, change_head)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word"):
        convert(src, tmp_path / "dst2", to="safetensors")


def test_head_of_a_reward_model_and_rotary_buffers_are_passed_over(copy, rewrite, hf_folder, tensors, tmp_path):
    src = copy("reward")

    def add(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(src, add)
    convert(src, tmp_path / "dst", to="orbax")
    convert(tmp_path / "dst", tmp_path / "hf", to="safetensors")
    assert tensors(tmp_path / "hf") == tensors(hf_folder("reward"))


def test_files_of_the_bare_model_lack_the_prefix(copy, rewrite, hf_folder, tensors, tmp_path):
    src = copy("tied")

    def strip(arrays):
        for name in list(arrays):
            arrays[name.removeprefix("model.")] = arrays.pop(name)

    rewrite(src, strip)
    config = json.loads((src / "config.json").read_text()) | {"architectures": ["Qwen2Model"]}
    (src / "config.json").write_text(json.dumps(config))
    convert(src, tmp_path / "dst", to="safetensors")
    assert tensors(tmp_path / "dst") == tensors(hf_folder("tied"))


def test_experts_in_one_tensor_a_layer(copy, rewrite, hf_folder, tensors, tmp_path):
    """The form that transformers 5 keeps in memory, built from its own parameters."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder("mixed"))
    state = {name: t.to(torch.float32).numpy() for name, t in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    src = copy("mixed")
    with safe_open(src / "model.safetensors", framework="np") as f:
        dtype = f.get_tensor("model.norm.weight").dtype
    arrays = {name: np.ascontiguousarray(array).astype(dtype) for name, array in state.items()}
    save_file(arrays, src / "model.safetensors")
    convert(src, tmp_path / "dst", to="orbax")
    convert(tmp_path / "dst", tmp_path / "hf", to="safetensors")
    assert tensors(tmp_path / "hf") == tensors(hf_folder("mixed"))


def test_wider_tensors_come_first_in_a_shard_so_that_all_are_aligned(tmp_path):
    slots = [Slot("narrow", "a", (), (3,)), Slot("wide", "b", (), (2,))]
    HfWriter(tmp_path, slots, [np.dtype(np.float16), np.dtype(np.float32)], max_shard_bytes=10**6)
    places = {name: stored.begin for name, stored in read_header(tmp_path / "model.safetensors").items()}
    assert places["wide"] % 4 == 0 and places["narrow"] == places["wide"] + 8
