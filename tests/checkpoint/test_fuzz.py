"""Damaged input ends in a UserError or a correct copy, never in another exception, never in half a destination."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.errors import UserError

EXAMPLES = 100


@pytest.fixture(scope="module")
def sharded(hf_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    convert(hf_folder("tied"), folder, to="safetensors", max_shard_size="40KB")
    return folder


@st.composite
def damage(draw):
    """(which file, a function from its bytes to damaged bytes); headers are hit more often than data."""
    file = draw(st.sampled_from(["config.json", "model.safetensors.index.json", "first", "last", "first", "last"]))
    near = draw(st.booleans())
    where = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["flip", "cut", "delete", "insert", "number", "swap"]))
    junk = draw(st.binary(min_size=1, max_size=8))

    def apply(raw: bytes) -> bytes:
        at, n = int(where * min(len(raw), 1500 if near else len(raw))), len(junk)
        before, here, then, after = raw[:at], raw[at:at + n], raw[at + n:at + 2 * n], raw[at + 2 * n:]
        match kind:
            case "flip":
                return before + bytes(a ^ b for a, b in zip(here, junk, strict=False)) + then + after
            case "cut":
                return before
            case "delete":
                return before + then + after
            case "insert":
                return before + junk + here + then + after
            case "number":
                return before + b"9" * n + then + after
            case "swap":
                return before + then + here + after

    return file, apply


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damage(), to=st.sampled_from(["safetensors", "safetensors", "safetensors", "orbax"]))
def test_damaged_files(damage, to, sharded, tensors, tmp_path):
    name, apply = damage
    src, dst = tmp_path / "src", tmp_path / "dst"
    for folder in (src, dst):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sharded, src)
    shards = sorted(src.glob("*.safetensors"))
    file = {"first": shards[0], "last": shards[-1]}.get(name) or src / name
    file.write_bytes(apply(file.read_bytes()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # configurations with unknown fields that are null
            convert(src, dst, to=to)
    except UserError as error:
        assert "\n" not in str(error)
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
        return
    assert {p.name for p in tmp_path.iterdir()} == {"src", "dst"}
    assert_equal_to_its_source(src, dst, tensors)


@pytest.fixture(scope="module")
def orbax(hf_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "orbax"
    convert(hf_folder("tied"), folder, to="orbax")
    return folder


ORBAX_FILES = ("params/_METADATA", "params/embed.table/zarr.json", "params/layers_0.mlp.up/zarr.json",
               "params/layers_0.mlp.up/c/1/0/0", "qwen2_jax.json", "generation_config.json")


@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damage(), name=st.sampled_from(ORBAX_FILES))
def test_damaged_orbax_checkpoint(damage, name, orbax, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for folder in (src, dst):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(orbax, src)
    (src / name).write_bytes(damage[1]((src / name).read_bytes()))
    try:
        convert(src, dst, to="safetensors")
    except UserError as error:
        assert "\n" not in str(error)
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
    else:
        open_checkpoint(dst)


def assert_equal_to_its_source(src: Path, dst: Path, tensors) -> None:
    """What was read as sound must be there bit for bit, by the safetensors library's own reading of the source."""
    stored = tensors(src)
    checkpoint = open_checkpoint(dst)
    assert json.loads((dst / "config.json").read_text())["num_hidden_layers"] == checkpoint.cfg.layers
    for slot in checkpoint.slots:
        data, dtype, shape = stored[slot.name]
        rows = checkpoint.reader.rows(slot, 0, slot.shape[0])
        assert (rows.tobytes(), rows.dtype.name, rows.shape) == (data, dtype, shape)
