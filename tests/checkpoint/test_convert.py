import dataclasses
import errno
import json
import logging
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.checkpoint import files, stream
from qwen2_jax.checkpoint.convert import convert, parse_size
from qwen2_jax.checkpoint.hf import HfWriter
from qwen2_jax.checkpoint.hf_config import read_config
from qwen2_jax.checkpoint.safetensors_format import StoredTensor
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.errors import UserError

from .conftest import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_byte(kind, hf_folder, tensors, tmp_path):
    src = hf_folder(kind)
    convert(src, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="safetensors")
    assert tensors(tmp_path / "hf") == tensors(src)
    assert read_config(tmp_path / "hf") == read_config(tmp_path / "orbax") == read_config(src)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "reward"])  # no such class in transformers
def test_written_folder_loads_in_transformers_without_a_word_about_keys(kind, hf_folder, tmp_path, caplog):
    import torch
    import transformers

    convert(hf_folder(kind), tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="safetensors", max_shard_size="40KB")
    auto = transformers.AutoModelForSequenceClassification if kind == "score" else transformers.AutoModelForCausalLM
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            model, info = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not any(info.values()), info
    assert not [r.getMessage() for r in caplog.records if "weight" in r.getMessage() or "key" in r.getMessage()]
    original = auto.from_pretrained(hf_folder(kind))
    ids = torch.tensor([[5, 9, 40, 11]])
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_shards_stay_below_the_limit_and_the_index_is_right(hf_folder, tensors, tmp_path):
    limit = 30_000
    convert(hf_folder("mixed"), tmp_path / "hf", to="safetensors", max_shard_size=limit)
    shards = sorted(tmp_path.joinpath("hf").glob("*.safetensors"))
    count = len(shards)
    assert [s.name for s in shards] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 3 and all(s.stat().st_size <= limit for s in shards)
    assert sum(s.stat().st_size for s in shards) > 0.7 * limit * (count - 1), "shards are needlessly small"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    stored = tensors(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(len(data) for data, _, _ in stored.values())
    assert index["weight_map"].keys() == stored.keys()
    assert stored == tensors(hf_folder("mixed"))


def test_a_tensor_above_the_limit_has_a_file_to_itself(hf_folder, tensors, tmp_path):
    convert(hf_folder("dense"), tmp_path / "hf", to="safetensors", max_shard_size=1)
    stored = tensors(tmp_path / "hf")
    assert len(list(tmp_path.joinpath("hf").glob("*.safetensors"))) == len(stored)
    assert stored == tensors(hf_folder("dense"))


def test_tokenizer_and_generation_files(hf_folder, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(hf_folder("dense"), src)
    (src / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "eos_token_id": [2, 7]}))
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates/tool.jinja").write_text("tools")
    convert(src, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="safetensors")
    for folder in (tmp_path / "orbax", tmp_path / "hf"):
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                     "chat_template.jinja", "additional_chat_templates/tool.jinja"):
            assert (folder / name).read_bytes() == (src / name).read_bytes()
        assert not (folder / "README.md").exists()
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["temperature"] == 0.7 and generation["eos_token_id"] == [2, 7]


def test_generation_config_has_both_stop_ids_of_the_family(hf_folder, tmp_path):
    cfg = dataclasses.replace(read_config(hf_folder("dense")), vocab=151936, eos_ids=(151645,))
    files.write_model_files(tmp_path, cfg)
    assert set(json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]) == {151643, 151645}


def test_dtype_float32_is_exact_and_bfloat16_rounds_to_nearest_even(hf_folder, tensors, rewrite, tmp_path):
    convert(hf_folder("dense"), tmp_path / "f32", to="orbax", dtype="float32")
    assert read_config(tmp_path / "f32").dtype == "float32"
    convert(tmp_path / "f32", tmp_path / "back", to="safetensors", dtype="bfloat16")
    assert tensors(tmp_path / "back") == tensors(hf_folder("dense"))
    convert(tmp_path / "f32", tmp_path / "f32hf", to="safetensors")
    odd = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf] * 8)

    def change(arrays):
        arrays["model.norm.weight"] = odd

    rewrite(tmp_path / "f32hf", change)
    convert(tmp_path / "f32hf", tmp_path / "rounded", to="orbax", dtype="bfloat16")
    convert(tmp_path / "rounded", tmp_path / "rounded_hf", to="safetensors")
    data, dtype, _ = tensors(tmp_path / "rounded_hf")["model.norm.weight"]
    assert dtype == "bfloat16"
    assert np.frombuffer(data, ml_dtypes.bfloat16)[:4].astype(np.float32).tolist() == [1, 1 + 2**-6, 1 + 2**-7, np.inf]


def test_layers_of_different_dtypes_need_a_dtype(hf_folder, rewrite, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(hf_folder("dense"), src)

    def widen(arrays):
        name = "model.layers.1.self_attn.q_proj.weight"
        arrays[name] = arrays[name].astype(np.float32)

    rewrite(src, widen)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj.*bfloat16.*layers\.1.*float32.*--dtype"):
        convert(src, tmp_path / "dst", to="orbax")
    convert(src, tmp_path / "dst", to="orbax", dtype="float32")


def test_verify_reports_no_difference_for_a_copy_and_rounding_for_a_cast(hf_folder, rewrite, tmp_path):
    same = convert(hf_folder("tied"), tmp_path / "same", to="orbax", verify=True)
    assert same.max_abs == 0 and same.kl_max == 0
    convert(hf_folder("tied"), tmp_path / "f32", to="safetensors", dtype="float32")

    def widen(arrays):
        for array in arrays.values():
            array *= np.float32(1 + 2**-9)

    rewrite(tmp_path / "f32", widen)
    cast = convert(tmp_path / "f32", tmp_path / "cast", to="orbax", dtype="bfloat16", verify=True)
    assert 0 < cast.max_abs < 0.01 and 0 < cast.kl_mean <= cast.kl_max < 0.1
    assert "KL" in cast.summary()


def test_verify_compares_the_scores_of_a_reward_model(hf_folder, tmp_path):
    comparison = convert(hf_folder("reward"), tmp_path / "dst", to="orbax", verify=True)
    assert comparison.score_gap == 0 and comparison.kl_mean is None


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_verify_finds_a_bit_that_was_not_written_and_leaves_nothing(to, hf_folder, tmp_path, monkeypatch):
    writer = HfWriter if to == "safetensors" else stream.TreeWriter
    honest = writer.write

    def flip(self, slot, start, piece):
        if slot.name == "model.layers.2.mlp.up_proj.weight":
            piece = piece.copy()
            piece.view(np.uint16)[-1, -1] ^= 1
        honest(self, slot, start, piece)

    monkeypatch.setattr(writer, "write", flip)
    with pytest.raises(UserError, match=r"verification failed: model\.layers\.2\.mlp\.up_proj\.weight"):
        convert(hf_folder("dense"), tmp_path / "dst", to=to, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_is_a_source(hf_folder, tensors, tmp_path):
    convert(hf_folder("dense") / "model.safetensors", tmp_path / "hf", to="safetensors")
    assert tensors(tmp_path / "hf") == tensors(hf_folder("dense"))
    assert (tmp_path / "hf/tokenizer.json").exists()


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_destination_that_exists_is_refused_and_untouched(to, hf_folder, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "mine").write_text("precious")
    with pytest.raises(UserError, match=f"{dst} already exists"):
        convert(hf_folder("dense"), dst, to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["dst"] and (dst / "mine").read_text() == "precious"


def test_source_as_destination_is_refused(hf_folder):
    with pytest.raises(UserError, match="both source and destination"):
        convert(hf_folder("dense"), hf_folder("dense"), to="orbax")


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_a_full_disk_while_writing_is_named_and_leaves_nothing(to, hf_folder, tmp_path, monkeypatch):
    def full(*_):
        if to == "safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device [os_error_code='28']")

    monkeypatch.setattr(*((os, "pwrite") if to == "safetensors" else (stream.TreeWriter, "write")), full)
    with pytest.raises(UserError, match=r"no space left on the disk of .*dst"):
        convert(hf_folder("dense"), tmp_path / "dst", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_a_disk_that_is_too_small_is_known_at_once(to, hf_folder, small_disk):
    (small_disk / "ballast").write_bytes(bytes(950_000))
    with pytest.raises(UserError, match=r"no space left on .*dst.* bytes are needed, .* are free"):
        convert(hf_folder("moe"), small_disk / "dst", to=to, dtype="float32")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_bad_choices_and_sizes(hf_folder, tmp_path):
    for name, value in (("to", "pickle"), ("dtype", "int8"), ("max_shard_size", "many"), ("max_shard_size", "0GB")):
        with pytest.raises(UserError, match=value):
            convert(hf_folder("dense"), tmp_path / "dst", **{"to": "orbax", name: value})
    assert [parse_size(s) for s in ("5GB", "2GiB", "1.5 MB", "300", 7)] == [5 * 10**9, 2 * 2**30, 1_500_000, 300, 7]
    assert parse_size("9" * 400) == 2**63  # beyond what a float holds; no limit at all


@pytest.mark.parametrize("src", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_checkpoint(src, tmp_path):
    with pytest.raises(UserError, match=f"{src} is not a .safetensors file"):
        convert(src, tmp_path / "dst", to="orbax")


def test_a_user_without_a_home_as_destination(hf_folder):
    with pytest.raises(UserError, match="no home folder of that user"):
        convert(hf_folder("dense"), "~no-such-user/dst", to="orbax")


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_small_files_that_cannot_be_read_are_known_before_weights_are_copied(to, hf_folder, tmp_path, monkeypatch):
    src = shutil.copytree(hf_folder("dense"), tmp_path / "src")
    monkeypatch.setattr("qwen2_jax.checkpoint.convert._copy", lambda *_: pytest.fail("weights were copied"))
    (src / "tokenizer.json").unlink()
    (src / "tokenizer.json").symlink_to("/no/such/blob")
    with pytest.raises(UserError, match=r"cannot read .*src/tokenizer.json: it is a link to /no/such/blob, which does"):
        convert(src, tmp_path / "dst", to=to)
    (src / "tokenizer.json").unlink()
    (src / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not valid JSON"):
        convert(src, tmp_path / "dst", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_what_a_killed_run_leaves_is_no_checkpoint(to, hf_folder, tmp_path, monkeypatch):
    left = []

    def killed(*_):
        [partial] = tmp_path.iterdir()
        left.append(shutil.copytree(partial, tmp_path / "left"))
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen2_jax.checkpoint.convert._copy", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(hf_folder("dense"), tmp_path / "dst", to=to)
    with pytest.raises(UserError, match=r"left has no config\.json"):
        open_checkpoint(left[0])


def test_destination_in_the_source_under_a_tokenizers_name(hf_folder, tmp_path):
    src = shutil.copytree(hf_folder("dense"), tmp_path / "src")
    (src / "additional_chat_templates").mkdir()
    convert(src, src / "tokenizer-2", to="safetensors")
    assert [p.name for p in (src / "tokenizer-2").iterdir() if p.is_dir()] == ["additional_chat_templates"]


def test_command_line(hf_folder, tensors, run_cli, tmp_path):
    done = run_cli("convert", hf_folder("mixed"), tmp_path / "orbax", "--to", "orbax", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights: largest difference 0; predictions: KL 0")
    assert "convert: 100%" in done.stderr and "WARNING" not in done.stderr
    done = run_cli("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "safetensors", "--max-shard-size", "40KB")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert tensors(tmp_path / "hf") == tensors(hf_folder("mixed"))
    done = run_cli("convert", hf_folder("mixed"), tmp_path / "orbax", "--to", "orbax")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "already exists" in done.stderr


def test_mark_of_a_newer_format_is_refused(hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "orbax", to="orbax")
    (tmp_path / "orbax" / files.MARK).write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        open_checkpoint(tmp_path / "orbax")


def test_pieces_much_smaller_than_tensors_change_nothing(hf_folder, tensors, tmp_path, monkeypatch):
    from qwen2_jax.checkpoint import pieces

    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    convert(hf_folder("dense"), tmp_path / "orbax", to="orbax", dtype="float32")
    assert len(list((tmp_path / "orbax/params/embed.table").glob("c/*/*"))) > 20
    convert(tmp_path / "orbax", tmp_path / "hf", to="safetensors", dtype="bfloat16")
    assert tensors(tmp_path / "hf") == tensors(hf_folder("dense"))


@pytest.mark.parametrize("attempt", range(5))
def test_an_error_while_pieces_are_being_written_leaves_nothing(attempt, hf_folder, tmp_path, monkeypatch):
    """The writes under way when the reader fails must not put files into the folder that is being removed."""
    read, count = StoredTensor.rows, iter(range(1000))

    def fail_late(self, start, stop, columns=None):
        if next(count) == 10 + attempt:
            raise UserError("damaged")
        return read(self, start, stop, columns)

    monkeypatch.setattr(StoredTensor, "rows", fail_late)
    with pytest.raises(UserError, match="damaged"):
        convert(hf_folder("mixed"), tmp_path / "dst", to="orbax")
    assert list(tmp_path.iterdir()) == []
