import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwen2_jax.checkpoint import pieces
from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.checkpoint.staging import staged
from qwen2_jax.checkpoint.stream import TreeReader, TreeWriter
from qwen2_jax.errors import UserError

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

# Runs with qwen2_jax locked out. Restores without a target, then onto a mesh of 4 with another dtype.
PLAIN_ORBAX = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["qwen2_jax"] = None
import jax, numpy as np, orbax.checkpoint as ocp
path, out = sys.argv[1:]
with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(path)
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    def target(leaf):
        axes = [None] * (leaf.ndim - 1) + ["x"] if leaf.ndim < 2 else [None] * (leaf.ndim - 2) + ["x", "y"]
        axes = [a if a and n % 2 == 0 else None for a, n in zip(axes, leaf.shape)]
        return jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=jax.NamedSharding(mesh, jax.P(*axes)))
    sharded = checkpointer.restore(path, jax.tree.map(target, tree))
flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}
for (k, v), s in zip(flat.items(), jax.tree.leaves(sharded)):
    assert s.dtype == "float32" and np.array_equal(np.asarray(s), np.asarray(v, np.float32)), k
assert len(sharded["layers_0"]["attn"]["q"].sharding.device_set) == 4
np.savez(out, **{k: np.asarray(v).view(np.uint16) for k, v in flat.items()})
"""


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_plain_orbax_restores_it_in_a_process_without_qwen2_jax(kind, hf_folder, process_env, tmp_path):
    convert(hf_folder(kind), tmp_path / "dst", to="orbax")
    env = process_env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    del env["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", PLAIN_ORBAX, tmp_path / "dst/params", tmp_path / "out.npz"],
                          env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(hf_folder(kind))
    restored = dict(np.load(tmp_path / "out.npz"))
    for slot in checkpoint.slots:
        rows = checkpoint.reader.rows(slot, 0, slot.shape[0])
        assert restored[slot.path][slot.index].tobytes() == rows.tobytes(), slot.name
    assert restored.keys() == {slot.path for slot in checkpoint.slots}


def test_files_hold_rows_of_one_layer_and_one_expert_in_parts(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 512)     # eight of the sixteen rows
    monkeypatch.setattr(pieces, "PART_BYTES", 150)      # two rows
    convert(hf_folder("moe"), tmp_path / "dst", to="orbax")
    folder = tmp_path / "dst/params/layers_0.moe.up"
    array = json.loads((folder / "zarr.json").read_text())
    assert array["shape"] == [5, 4, 16, 32] and array["data_type"] == "bfloat16"
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [1, 1, 8, 32]
    assert array["codecs"][0]["configuration"]["chunk_shape"] == [1, 1, 2, 32]
    assert len([file for file in folder.rglob("*") if file.is_file()]) == 1 + 5 * 4 * 2


def write(folder, tree, slots):
    writer = TreeWriter(folder, {s.path: tree[s.path].shape for s in slots}, slots, [tree[s.path].dtype for s in slots])
    try:
        for slot in slots:
            writer.write(slot, 0, np.ascontiguousarray(tree[slot.path][slot.index]))
    finally:
        writer.close()


def test_values_equal_to_the_fill_value_are_stored_too(tmp_path):
    tree = {"a/zero": np.zeros((2, 4), F32), "b": np.zeros(3, BF16)}
    layers = [Slot(str(i), "a/zero", (i,), (4,)) for i in range(2)]
    write(tmp_path / "t", tree, [*layers, Slot("2", "b", (), (3,))])
    reader = TreeReader(tmp_path / "t")
    reader.check({"a/zero": (2, 4), "b": (3,)})
    assert (reader.rows(layers[1], 1, 3) == 0).all()


def test_a_lost_chunk_is_an_error_and_not_zeros(hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "dst", to="orbax")
    (tmp_path / "dst/params/layers_0.mlp.up/c/1/0/0").unlink()
    with pytest.raises(UserError, match=r"layers_0\.mlp\.up lacks some of its chunks"):
        convert(tmp_path / "dst", tmp_path / "hf", to="safetensors")


@pytest.mark.parametrize("damage, found", [("cut", r"layers_0\.mlp\.up cannot be opened"),
                                           ("flipped", r"layers_0/mlp/up cannot be read")])
def test_a_damaged_chunk_is_named(damage, found, hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "dst", to="orbax")
    chunk = tmp_path / "dst/params/layers_0.mlp.up/c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1       # a single bit of a weight, which decompresses all the same
    chunk.write_bytes(data[:50] if damage == "cut" else data)
    with pytest.raises(UserError, match=found) as error:
        convert(tmp_path / "dst", tmp_path / "hf", to="safetensors")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("hf*"))


def test_missing_unexpected_and_misshapen_parameters_are_named(hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "dst", to="orbax")
    convert(hf_folder("tied"), tmp_path / "tied", to="orbax")
    dense, tied = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dst", "tied"))
    for src, config, message in ((tmp_path / "tied", dense, "parameter head/table is missing"),
                                 (tmp_path / "dst", tied, "unexpected parameter head/table"),
                                 (tmp_path / "dst", dense | {"vocab_size": 95}, r"embed/table has shape \[96, 32\]")):
        (src / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            open_checkpoint(src)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tree_metadata": {"a": {}}}', '{"tree_metadata": 3}', None])
def test_damaged_metadata_is_named(text, hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "dst", to="orbax")
    file = tmp_path / "dst/params/_METADATA"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match="_METADATA"):
        open_checkpoint(tmp_path / "dst")


def test_a_lost_array_is_named(hf_folder, tmp_path):
    convert(hf_folder("dense"), tmp_path / "dst", to="orbax")
    shutil.rmtree(tmp_path / "dst/params/norm.scale")
    with pytest.raises(UserError, match=r"array norm\.scale cannot be opened"):
        open_checkpoint(tmp_path / "dst")


@pytest.mark.parametrize("leaf", ["integer", "float64"])
def test_other_dtypes_are_refused(leaf, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "t", {"w": np.zeros(3, np.int32 if leaf == "integer" else np.float64)})
    with pytest.raises(UserError, match=r"w is stored as (int32|float64); only"):
        TreeReader(tmp_path / "t").check({"w": (3,)})


@pytest.mark.parametrize("form", ["ocdbt", "zarr", "zarr3"])
def test_what_orbax_itself_wrote_is_read(form, tmp_path):
    tree = {"a": {"b": jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)}, "c": jnp.zeros(5)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=form != "zarr", use_zarr3=form == "zarr3")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "t", args=ocp.args.PyTreeSave(tree))
    reader = TreeReader(tmp_path / "t")
    reader.check({"a/b": (2, 3, 4), "c": (5,)})
    rows = reader.rows(Slot("x", "a/b", (1,), (3, 4)), 1, 3)
    assert rows.tobytes() == np.asarray(tree["a"]["b"])[1, 1:3].tobytes()
    assert jax.tree.structure(tree).num_leaves == 2


@pytest.mark.parametrize(("layers", "rows"), [(64, 256), (3, 2048)])  # three pieces are queued: `close` has to tell
def test_a_disk_that_fills_up_while_chunks_are_written(layers, rows, small_disk):
    tree = {"w": np.random.default_rng(0).normal(size=(layers, rows, 128)).astype(F32)}
    with pytest.raises(UserError, match=r"no space left on the disk of .*dst"), staged(small_disk / "dst") as partial:
        write(partial / "params", tree, [Slot(str(i), "w", (i,), (rows, 128)) for i in range(layers)])
    assert list(small_disk.iterdir()) == []
