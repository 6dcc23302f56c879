"""Where a parameter lies: what is split over what, what becomes of sizes that do not divide, and that it is said."""

from __future__ import annotations

import dataclasses
import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from qwen2_jax.model.decoder import abstract_params, param_specs
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.mesh import make_mesh, shardings
from qwen2_jax.sharding.rules import TABLE, Rules, units
from qwen2_jax.sharding.split import Split

SMALL, BIG, MOE = PRESETS["Qwen2-0.5B"], PRESETS["Qwen2-7B"], PRESETS["Qwen2-57B-A14B"]


def rules(cfg, **sizes) -> Rules:
    return Rules.of(cfg, Axes(tuple(sizes.items())))


def test_every_axis_of_the_family_is_in_the_table():
    for cfg in PRESETS.values():
        assert units(cfg).keys() <= TABLE.keys()
        param_specs(cfg, None)      # raises KeyError for an axis that the table has not got


def test_tensor_before_fsdp_on_outputs_and_fsdp_dimension_by_dimension():
    found = rules(BIG, fsdp_x=4, fsdp_y=4, tensor=4)
    assert found.placement(("ffn", "embed"), (18944, 3584)) == (("tensor", "fsdp_x", "fsdp_y"), ())
    assert found.placement(("embed", "ffn"), (3584, 18944)) == (("fsdp_x", "fsdp_y"), ("tensor",))
    assert found.spec(("vocab", "embed"), (152064, 3584)) == P(("tensor", "fsdp_x", "fsdp_y"), None)
    assert found.local_shape(("embed", "ffn"), (3584, 18944)) == (224, 4736)
    assert found.spec(("norm",), (3584,)) == P(None), "a norm's scale is not worth a gather"


def test_experts():
    found = rules(MOE, fsdp_x=2, expert=8, tensor=2)
    assert found.spec(("expert", "expert_ffn", "embed"), (64, 2560, 3584)) == P(("expert",), ("tensor", "fsdp_x"), None)
    assert found.spec(("expert", "embed", "expert_ffn"), (64, 3584, 2560)) == P(("expert",), ("fsdp_x",), ("tensor",))
    assert "expert" not in rules(MOE, expert=3).split


def test_outputs_that_fsdp_does_not_divide():
    """Qwen2-0.5B's vocabulary is 2^7 x 1187: what does not fit its rows goes to its columns, or nowhere."""
    found = rules(SMALL, fsdp_x=16, fsdp_y=16)
    assert found.spec(("vocab", "embed"), (151936, 896)) == P(("fsdp_x",), ("fsdp_y",))
    assert found.spec(("label", "hidden"), (1, 7)) == P(None, None)


@pytest.mark.parametrize("tensor, copies, split", [
    (2, 1, {"heads", "kv_heads"}), (4, 1, {"heads", "kv_heads"}),
    (28, 7, {"heads"}),         # 28 query heads, 4 key-value heads: seven devices share one
    (8, 1, set()),              # 28 heads on 8 devices
])
def test_heads(tensor, copies, split):
    found = rules(BIG, tensor=tensor)
    assert found.kv_copies == copies and found.split & {"heads", "kv_heads"} == split


def test_heads_whose_keys_lie_across_devices_are_not_split():
    """12 query heads over 3 devices look at 4 key-value heads: no device's four would find them on one."""
    found = rules(dataclasses.replace(BIG, heads=12, kv_heads=4), tensor=3)
    assert not found.split & {"heads", "kv_heads"} and found.kv_copies == 1


def test_what_is_not_split_is_said_once(caplog):
    cfg = dataclasses.replace(SMALL, vocab=151937)
    with caplog.at_level(logging.INFO, logger="qwen2_jax"):
        for _ in range(2):
            rules(cfg, tensor=4)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "vocab: 151937 cannot be split over tensor=4, so each device along it has all" in said[0]
    assert "heads: 14" in said[1] and "kv_heads: 2" in said[2]


def test_a_split_on_one_device_is_nothing():
    split = Split.of(BIG, Axes(), "ffn")
    x = jax.numpy.ones((1, 2, 3))
    assert split.enter(x) is x and split.leave(x) is x and split.inside(x) is x and split.joined(x) is x


@pytest.mark.parametrize("cfg", [SMALL, BIG, MOE], ids=["0.5B", "7B", "57B-A14B"])
@pytest.mark.parametrize("mesh, over", [("fsdp=2x2,tensor=2", 1.05), ("expert=2,fsdp=4", 1.2), ("tensor=8", 1.8)])
def test_the_parts_of_all_devices_are_the_model(cfg, mesh, over):
    """Every parameter divides as its spec says, and a mesh that splits weights n ways holds about a n-th on each:
    `over` times that, where attention is whole (14 or 28 heads on 8 devices) or a shared expert is not split."""
    mesh = make_mesh(mesh)
    where = shardings(param_specs(cfg, mesh), mesh)
    held = whole = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract_params(cfg)), jax.tree.leaves(where), strict=True):
        piece = sharding.shard_shape(leaf.shape)    # raises where a dimension does not divide
        held += jax.numpy.prod(jax.numpy.array(piece, float))
        whole += leaf.size
    n = 4 if "expert" in mesh.axis_names and cfg.moe is None else 8
    assert held < whole / n * over
