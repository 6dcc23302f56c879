"""The real programs of each family on one host of each TPU generation: what they hold, what travels."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.model.cache import empty_cache
from qwen2_jax.model.decoder import abstract_params
from qwen2_jax.plan.plan import Plan, make_plan
from qwen2_jax.plan.program import Task
from qwen2_jax.plan.topology import parse_topology
from qwen2_jax.presets import PRESETS

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = [pytest.mark.usefixtures("no_compilation_cache"), pytest.mark.slow, pytest.mark.optax]

TOPOLOGIES = ("v2:2x2", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SIZES = dict(layers=2, vocab=4096, d_model=512, d_ff=1024, heads=4, kv_heads=2)
MOE = dataclasses.replace(PRESETS["Qwen2-57B-A14B"].moe, experts=8, top_k=2, d_expert=256, d_shared=512)
FAMILIES = {"tied": dataclasses.replace(PRESETS["Qwen2-0.5B"], **SIZES, head_dim=128),
            "untied": dataclasses.replace(PRESETS["Qwen2-7B"], **SIZES),
            "moe": dataclasses.replace(PRESETS["Qwen2-57B-A14B"], **SIZES, moe=MOE)}
MESHES = {"train": {"untied": "fsdp=2x2", "moe": "fsdp=2,expert=2"},
          "serve": {"tied": "data=2,tensor=2", "untied": "tensor=4", "moe": "expert=2,tensor=2"}}
SERVED = [("decode", name) for name in TOPOLOGIES] + [("prefill", name) for name in TOPOLOGIES[:2]]
"""Prompts without attention's kernel, and with it."""
ROWS, TOKENS = 4, 512
PADDING = 1.1
"""Arguments over their numbers: tiles that small arrays do not fill."""
SMALL = 64 * 2**10
"""Bytes: gradients of biases and norms, which are summed whole; no matrix is as small."""
GATHERS = 2
"""Each matrix in bfloat16, forward and for the backward pass; a part of them may stay."""
ACTIVATIONS = 32 * 2**20
"""Bytes: of a training step, whose float32 logits of 512 tokens are 8 MiB."""
SERVING_TEMPORARIES = 16 * 2**20


def planned(family: str, topology: str, mode: str) -> Plan:
    mesh = MESHES["train" if mode == "train" else "serve"][family]
    task = Task(cfg=FAMILIES[family], mode=mode, seq=TOKENS, batch=ROWS)
    return make_plan(family, task, parse_topology(topology), mesh, say=lambda line: None)


def bytes_of(tree, itemsize: int) -> int:
    return itemsize * sum(leaf.size for leaf in jax.tree.leaves(tree))


def carried(dtype: str, text: str) -> list[str]:
    """Shapes of the stacks of matrices, of both layers, that loops carry from turn to turn."""
    loops = re.findall(r"= \((.*)\) while\(", text)
    return [shape for loop in loops for shape in re.findall(rf"\b{dtype}\[2,(\d+,[\d,]+)\]", loop)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", MESHES["train"])
def test_training(family, topology):
    """Float32 weights and two moments lie spread over all four devices; weights travel twice, gradients scattered."""
    plan = planned(family, topology, "train")
    params = abstract_params(FAMILIES[family])
    state = 3 * bytes_of(params, 4) / 4
    assert state <= plan.argument_bytes <= PADDING * state
    gradients = bytes_of(params, 2) / 4
    assert plan.peak_bytes <= plan.argument_bytes + gradients + GATHERS * bytes_of(params, 2) + ACTIVATIONS
    float32, bfloat16 = (Counter(carried(dtype, plan.text)) for dtype in ("f32", "bf16"))
    # The scans forward and back have the weights, that back has the gradients too: nobody keeps a copy of either.
    assert float32 and float32 == {shape: 2 * bfloat16[shape] for shape in float32}
    rows = plan.collectives or []
    summed = [row for row in rows if row.kind == "all-reduce" and row.bytes > SMALL * row.count]
    assert summed == []
    gathered = sum(row.bytes for row in rows if row.kind == "all-gather")
    assert gathered <= 1.3 * GATHERS * bytes_of(params, 2), "0.3 for tokens and their choices, which experts gather"


@pytest.mark.parametrize(("mode", "topology"), SERVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_serving(family, mode, topology):
    """Weights stay where they are: what travels are activations."""
    plan = planned(family, topology, mode)
    cfg = FAMILIES[family]
    cache = jax.eval_shape(lambda: empty_cache(cfg, ROWS, TOKENS, jnp.bfloat16, stacked=True))
    assert plan.argument_bytes <= PADDING * (bytes_of(abstract_params(cfg), 2) + bytes_of(cache, 2))
    assert plan.temp_bytes <= SERVING_TEMPORARIES
    tokens = ROWS if mode == "decode" else TOKENS
    widest = max(tokens * cfg.d_model * 4, ROWS * cfg.vocab * 4)
    assert [row for row in plan.collectives or [] if row.bytes > row.count * widest] == []
