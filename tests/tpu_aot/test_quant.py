"""On TPU an int8 matrix is read as int8: no bfloat16 copy of it is made on its way into a product, but for experts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.model.cache import empty_cache
from qwen2_jax.model.decoder import Decoder, abstract_params
from qwen2_jax.ops.quant import Int8
from qwen2_jax.ops.vocab import logits
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.axes import Axes
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = pytest.mark.usefixtures("no_compilation_cache")    # no TPU program can be read back without a TPU

ROWS, SLOTS = 8, 4096
DENSE = dataclasses.replace(PRESETS["Qwen2-7B"], layers=3, vocab=32768)
BIG_MOE = PRESETS["Qwen2-57B-A14B"]
MOE = dataclasses.replace(BIG_MOE, layers=2, vocab=4096, moe=dataclasses.replace(BIG_MOE.moe, experts=8))
TEMPORARIES = {"dense": 2 * DENSE.d_ff * DENSE.d_model, "moe": 3 * 8 * 2560 * 3584}
"""Bytes. Of a dense layer, one matrix in bfloat16 (130 MiB; the cache takes 192): XLA may fetch an int8 one ahead. Of
a sparse layer, half of its three of experts: the grouped kernel takes no int8, so one of them is widened at a time.
"""


def decode_step(cfg, quant):
    """The compiled step of one token for ROWS rows."""
    device = NamedSharding(Mesh(np.array(tpu_devices("v5e:2x2")[:1]), ("data",)), PartitionSpec())

    def step(params, ids_B1, cache, start_B):
        decoder = Decoder(cfg, Axes(chip="TPU v5 lite"), jnp.bfloat16, train=False)
        out = decoder.apply({"params": params}, ids_B1, cache=cache, start=start_B)
        return logits(out.x_BTD[:, 0], out.head["table"]), out.cache

    def held(leaf):
        dtype = leaf.dtype if leaf.dtype == jnp.int8 else jnp.bfloat16
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    def params():
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Int8) else held(leaf),
                            abstract_params(cfg, quant=quant), is_leaf=lambda x: isinstance(x, Int8))

    cache = jax.eval_shape(lambda: empty_cache(cfg, ROWS, SLOTS, jnp.bfloat16, stacked=True))
    args = (params(), jax.ShapeDtypeStruct((ROWS, 1), jnp.int32), cache, jax.ShapeDtypeStruct((ROWS,), jnp.int32))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), args)
    return jax.jit(step, donate_argnums=2).lower(*args).compile()


@pytest.mark.parametrize("kind, cfg", [("dense", DENSE), ("moe", MOE)], ids=["dense", "moe"])
def test_decoding_copies_neither_weights_nor_cache(kind, cfg):
    memory, whole = (decode_step(cfg, quant).memory_analysis() for quant in ("int8", None))
    assert max(memory.temp_size_in_bytes, whole.temp_size_in_bytes) < TEMPORARIES[kind]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(cfg)))
    assert whole.argument_size_in_bytes - memory.argument_size_in_bytes > 0.98 * weights, "half of bfloat16's bytes"
