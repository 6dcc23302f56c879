import dataclasses
import math

import pytest
from safetensors import safe_open

from qwen2_jax.checkpoint import names
from qwen2_jax.checkpoint.hf_config import read_config
from qwen2_jax.errors import UserError
from qwen2_jax.presets import PRESETS
from qwen2_jax.shapes import count_params, param_shapes

from .conftest import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_files_that_transformers_writes(kind, hf_folder):
    with safe_open(hf_folder(kind) / "model.safetensors", framework="np") as f:
        stored = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    slots = names.slots(read_config(hf_folder(kind)))
    assert {slot.name: slot.shape for slot in slots} == stored
    assert len(slots) == len(stored)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_fill_the_tree_exactly_once(kind, stacked, hf_folder):
    cfg = read_config(hf_folder(kind))
    shapes, slots = param_shapes(cfg, stacked=stacked), names.slots(cfg, stacked=stacked)
    assert len({(slot.path, slot.index) for slot in slots}) == len(slots)
    filled = dict.fromkeys(shapes, 0)
    for slot in slots:
        assert shapes[slot.path][len(slot.index):] == slot.shape
        assert all(i < n for i, n in zip(slot.index, shapes[slot.path], strict=False))
        filled[slot.path] += math.prod(slot.shape)
    assert filled == {path: math.prod(shape) for path, shape in shapes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_list_the_same_tensors_in_the_same_order(kind, hf_folder):
    cfg = read_config(hf_folder(kind))
    stacked, single = names.slots(cfg), names.slots(cfg, stacked=False)
    assert [(s.name, s.shape) for s in stacked] == [(s.name, s.shape) for s in single]


def test_layer_and_expert_become_the_leading_indices_of_a_run(hf_folder):
    by_name = {slot.name: slot for slot in names.slots(read_config(hf_folder("mixed")))}  # layer 1 is dense
    slot = by_name["model.layers.4.mlp.experts.3.down_proj.weight"]
    assert (slot.path, slot.index, slot.shape) == ("layers_2/moe/down", (2, 3), (32, 16))
    slot = by_name["model.layers.1.mlp.down_proj.weight"]
    assert (slot.path, slot.index, slot.shape) == ("layers_1/mlp/down", (0,), (32, 48))


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_of_all_published_models(preset):
    cfg = PRESETS[preset]
    assert sum(math.prod(slot.shape) for slot in names.slots(cfg)) == count_params(cfg).total


def test_a_number_of_experts_that_no_machine_holds_is_refused(hf_folder):
    cfg = read_config(hf_folder("moe"))
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, experts=2**31 - 1))
    with pytest.raises(UserError, match="num_experts"):
        names.slots(cfg)


def test_rows_are_unique_in_both_directions():
    hf, ours = zip(*names.ROWS, strict=True)
    assert len(set(hf)) == len(set(ours)) == len(names.ROWS)


def test_experts_in_one_tensor_are_taken_apart_where_transformers_5_put_them():
    parts = names.fused_experts("model.layers.7.mlp.experts.gate_up_proj", (3, 10, 4))
    assert [name for name, _, _ in parts][:3] == [f"model.layers.7.mlp.experts.{e}.{p}_proj.weight"
                                                  for e, p in ((0, "gate"), (0, "up"), (1, "gate"))]
    assert [(shape, first) for _, shape, first in parts] == [((5, 4), n * 20) for n in range(6)]
    assert names.fused_experts("model.layers.7.mlp.experts.down_proj", (2, 4, 5)) == [
        ("model.layers.7.mlp.experts.0.down_proj.weight", (4, 5), 0),
        ("model.layers.7.mlp.experts.1.down_proj.weight", (4, 5), 20)]
    assert names.fused_experts("model.layers.7.mlp.experts.gate_up_proj", (3, 9, 4)) is None
    assert names.fused_experts("model.layers.7.mlp.experts.gate_up_proj", (10**12, 2, 0)) is None
    assert names.fused_experts("model.layers.7.mlp.gate.weight", (3, 10, 4)) is None


def test_rotary_buffers_are_inert_and_nothing_else_is():
    assert names.is_inert("model.layers.0.self_attn.rotary_emb.inv_freq") and names.is_inert("rotary_emb.inv_freq")
    assert not any(names.is_inert(hf) for hf, _ in names.ROWS)
