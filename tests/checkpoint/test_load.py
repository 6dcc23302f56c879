import math

import jax
import numpy as np
import pytest

from qwen2_jax.checkpoint import names, pieces
from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.export import LiveReader, export_hf, save_params
from qwen2_jax.checkpoint.hf_config import read_config
from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.checkpoint.tree import flat, nested
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import Decoder
from qwen2_jax.model.heads import score
from qwen2_jax.ops.dot import matmul
from qwen2_jax.shapes import param_shapes

from .conftest import KINDS


@pytest.fixture(params=["hf", "orbax"])
def source(request, hf_folder, tmp_path):
    """`source(kind)`: the checkpoint as a Hugging Face folder, and as ours."""

    def make(kind):
        if request.param == "hf":
            return hf_folder(kind)
        convert(hf_folder(kind), tmp_path / "orbax", to="orbax")
        return tmp_path / "orbax"

    return make


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_leaves_hold_the_tensors_of_the_file(kind, stacked, source, hf_folder, tensors):
    leaves = flat(load_params(source(kind), dtype="keep", stacked=stacked))
    cfg = read_config(hf_folder(kind))
    assert {path: leaf.shape for path, leaf in leaves.items()} == param_shapes(cfg, stacked=stacked)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    stored = tensors(hf_folder(kind))
    for slot in names.slots(cfg, stacked=stacked):
        assert np.asarray(leaves[slot.path])[slot.index].tobytes() == stored[slot.name][0], slot.name


# Sums of some tens of float32 products of size 1, in another order than torch's.
LOGIT_TOLERANCE = 2e-5


@pytest.mark.parametrize("kind", ["dense", "tied", "mixed", "score", "reward"])
def test_the_loaded_model_computes_what_torch_computes(kind, hf_folder, tmp_path):
    """A row of the name map that pointed to another tensor of the same shape would survive any round trip."""
    ids = np.random.default_rng(0).integers(4, 96, (2, 12), dtype=np.int32)
    expected = torch_output(kind, hf_folder(kind), ids)
    convert(hf_folder(kind), tmp_path / "orbax", to="orbax", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "orbax")
    out = Decoder(checkpoint.cfg).apply({"params": load_params(checkpoint, dtype="keep", stacked=True)}, ids)
    got = score(out.x_BTD[:, -1], out.head) if kind in ("score", "reward") else matmul(out.x_BTD, out.head["table"])
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected, rtol=0, atol=LOGIT_TOLERANCE * np.abs(expected).max())


def torch_output(kind, folder, ids):
    import torch
    import transformers
    from safetensors.torch import load_file

    auto = transformers.AutoModelForSequenceClassification if kind == "score" else transformers.AutoModelForCausalLM
    with torch.no_grad():
        if kind != "reward":
            return auto.from_pretrained(folder, dtype=torch.float32)(torch.tensor(ids).long()).logits.numpy()
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.Qwen2Model(config).float()
        model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        hidden = model(torch.tensor(ids).long()).last_hidden_state[:, -1]
        hidden = torch.relu(hidden @ state["score.0.weight"].T + state["score.0.bias"])
        return (hidden @ state["score.2.weight"].T + state["score.2.bias"]).numpy()


def test_cast_on_the_way_in(hf_folder):
    kept = flat(load_params(hf_folder("moe"), dtype="keep", stacked=True))
    wide = flat(load_params(hf_folder("moe"), dtype="float32", stacked=True))
    for path, leaf in wide.items():
        assert leaf.dtype == np.float32 and np.array_equal(leaf, np.asarray(kept[path], np.float32))
    with pytest.raises(UserError, match="dtype 'int8' is not supported"):
        load_params(hf_folder("moe"), dtype="int8", stacked=True)


def test_pieces_smaller_than_a_tensor_change_nothing(hf_folder, monkeypatch):
    whole = flat(load_params(hf_folder("mixed"), dtype="float32", stacked=True))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    cut = flat(load_params(hf_folder("mixed"), dtype="float32", stacked=True))
    assert all(np.array_equal(cut[path], leaf) for path, leaf in whole.items())


def sharded(cfg):
    """A tree of shardings on four devices: experts, rows, columns, a vector; everything else is replicated."""
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    specs = {"embed/table": jax.P("x"), "layers_0/attn/q_bias": jax.P(None, "y"),
             "layers_0/moe/up": jax.P(None, "x", "y"), "layers_0/moe/down": jax.P(None, None, "x", "y")}
    return nested({path: jax.NamedSharding(mesh, specs.get(path, jax.P())) for path in param_shapes(cfg)})


def test_shardings_are_kept_and_only_their_slices_read(hf_folder):
    cfg = read_config(hf_folder("moe"))
    shardings = sharded(cfg)
    checkpoint = open_checkpoint(hf_folder("moe"))
    read = {}
    rows = checkpoint.reader.rows

    def counted(slot, start, stop, columns=slice(None)):
        found = rows(slot, start, stop, columns if len(slot.shape) == 2 else None)
        read[slot.path] = read.get(slot.path, 0) + found.size
        return found

    checkpoint.reader.rows = counted
    placed = flat(load_params(checkpoint, dtype="keep", stacked=True, shardings=shardings))
    whole = flat(load_params(hf_folder("moe"), dtype="keep", stacked=True))
    for path, leaf in placed.items():
        assert leaf.sharding == flat(shardings)[path], path
        assert np.asarray(leaf).tobytes() == np.asarray(whole[path]).tobytes(), path
    assert read == {path: math.prod(shape) for path, shape in param_shapes(cfg).items()}, "once, although two hold each"


@pytest.mark.parametrize("spans, place, joined", [
    ([(0, 4), (4, 8)], 0, (0, 8)), ([(0, 4), (4, 8)], 5, (0, 8)), ([(0, 2), (6, 8), (4, 6)], 7, (4, 8)),
    ([(0, 2), (6, 8), (4, 6)], 1, (0, 2)), ([(3, 9)], 3, (3, 9)), ([(0, 9), (2, 4)], 3, (0, 9)),
])
def test_columns_side_by_side_are_read_together(spans, place, joined):
    from qwen2_jax.checkpoint.load import _joined

    assert _joined(spans, place) == range(*joined)


def test_configuration_of_another_model_is_refused(hf_folder):
    with pytest.raises(UserError, match="other shapes"):
        load_params(hf_folder("dense"), read_config(hf_folder("tied")), dtype="keep", stacked=True)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "tied", "reward"])
def test_a_live_tree_is_written_back_bit_for_bit(kind, stacked, hf_folder, tensors, tmp_path):
    params, cfg = load_params(hf_folder(kind), dtype="keep", stacked=stacked), read_config(hf_folder(kind))
    export_hf(params, cfg, tmp_path / "hf", beside=hf_folder(kind), max_shard_size="40KB")
    assert tensors(tmp_path / "hf") == tensors(hf_folder(kind))
    assert (tmp_path / "hf/tokenizer.json").exists()
    save_params(params, cfg, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf2", to="safetensors")
    assert tensors(tmp_path / "hf2") == tensors(hf_folder(kind))
    assert not (tmp_path / "hf2/tokenizer.json").exists()


def test_a_sharded_tree_is_written_back(hf_folder, tensors, tmp_path):
    cfg = read_config(hf_folder("moe"))
    params = load_params(hf_folder("moe"), dtype="keep", stacked=True, shardings=sharded(cfg))
    export_hf(params, cfg, tmp_path / "hf")
    assert tensors(tmp_path / "hf") == tensors(hf_folder("moe"))


def test_exported_configuration_names_the_dtype_of_the_weights(hf_folder, tmp_path):
    params, cfg = load_params(hf_folder("dense"), dtype="float32", stacked=False), read_config(hf_folder("dense"))
    assert cfg.dtype == "bfloat16"
    export_hf(params, cfg, tmp_path / "keep")
    export_hf(params, cfg, tmp_path / "bf16", dtype="bfloat16")
    assert read_config(tmp_path / "keep").dtype == "float32" and read_config(tmp_path / "bf16").dtype == "bfloat16"


def test_a_tree_of_another_model_is_our_bug_and_writes_nothing(hf_folder, tmp_path):
    params, cfg = load_params(hf_folder("dense"), dtype="keep", stacked=True), read_config(hf_folder("dense"))
    with pytest.raises(ValueError, match="either layout"):
        LiveReader(params, read_config(hf_folder("tied")))
    params["norm"]["scale"] = params["norm"]["scale"][:-1]
    with pytest.raises(ValueError, match="norm/scale has shape"):
        save_params(params, cfg, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_cpu_arrays_take_over_the_buffer_that_was_read_into(hf_folder):
    """Otherwise a model is on the host twice while it loads."""
    from qwen2_jax.checkpoint import load

    seen = []
    empty = load._empty_aligned

    def remember(shape, dtype):
        seen.append(empty(shape, dtype))
        return seen[-1]

    load._empty_aligned = remember
    try:
        leaf = load_params(hf_folder("dense"), dtype="keep", stacked=True)["embed"]["table"]
    finally:
        load._empty_aligned = empty
    assert leaf.unsafe_buffer_pointer() == seen[0].ctypes.data
