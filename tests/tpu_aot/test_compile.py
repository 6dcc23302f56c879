"""The decoder compiles for real TPU topologies, ahead of time, without a TPU; memory is the compiler's own account."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.model.cache import empty_cache
from qwen2_jax.model.decoder import Decoder, abstract_params
from qwen2_jax.ops.vocab import logits, target_logprobs
from qwen2_jax.presets import PRESETS
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = pytest.mark.usefixtures("no_compilation_cache")    # no TPU program can be read back without a TPU

TOPOLOGIES = ("v5e:2x2", "v2:2x2")  # v2 has other matrix units, and kernels of its own
MIB = 2**20
DECODE_TEMPORARIES = 16 * MIB   # activations of 8 rows; a copy of the cache or of a layer's weights would be more
SMALL = dataclasses.replace(PRESETS["Qwen2-0.5B"], layers=2, vocab=2048)
SMALL_MOE = dataclasses.replace(PRESETS["Qwen2-57B-A14B"], layers=1, vocab=2048, d_model=512, d_ff=1024, heads=4,
                                kv_heads=2, moe=dataclasses.replace(PRESETS["Qwen2-57B-A14B"].moe, experts=8, top_k=2,
                                                                    d_expert=256, d_shared=512))


@pytest.fixture(scope="module", params=TOPOLOGIES)
def on_tpu(request):
    """A function that makes abstract arrays on one device of the topology."""
    devices = tpu_devices(request.param)
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), PartitionSpec())
    def abstract(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    abstract.topology = request.param
    return abstract


def bfloat16_params(cfg):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), abstract_params(cfg))


@pytest.mark.parametrize("cfg", [SMALL, SMALL_MOE], ids=["dense", "moe"])
def test_decoding_updates_the_cache_in_place(on_tpu, cfg):
    def step(params, ids_B1, cache, start_B):
        decoder = Decoder(cfg, dtype=jnp.bfloat16, train=False)
        out = decoder.apply({"params": params}, ids_B1, cache=cache, start=start_B)
        return logits(out.x_BTD, out.head["table"]), out.cache

    cache = jax.eval_shape(lambda: empty_cache(cfg, 8, 1024, jnp.bfloat16, stacked=True))
    rows = jax.ShapeDtypeStruct((8, 1), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    args = on_tpu((bfloat16_params(cfg), rows[0], cache, rows[1]))
    memory = jax.jit(step, donate_argnums=2).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.size * 2 for leaf in jax.tree.leaves(cache))
    if cfg.moe is None and on_tpu.topology == "v5e:2x2":    # v2 widens each layer's weights to float32
        assert memory.temp_size_in_bytes < DECODE_TEMPORARIES


@pytest.mark.parametrize("on_tpu", TOPOLOGIES[:1], indirect=True)
def test_a_loss_never_holds_all_logits(on_tpu):
    cfg = dataclasses.replace(SMALL, layers=1, vocab=32768, d_ff=1024)
    tokens = 4096

    def loss(params, ids_BT):
        out = Decoder(cfg, dtype=jnp.bfloat16, remat="full").apply({"params": params}, ids_BT)
        return -target_logprobs(out.x_BTD, out.head["table"], ids_BT)[0].sum()

    args = on_tpu((bfloat16_params(cfg), jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)))
    memory = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * cfg.vocab * 4
