"""Which kernel attends on which TPU, and that its program holds no scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.model.decoder import Decoder, abstract_params, param_specs
from qwen2_jax.ops.vocab import target_logprobs
from qwen2_jax.presets import PRESETS
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, make_mesh, per_device, shardings
from qwen2_jax.sharding.order import balance
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = pytest.mark.usefixtures("no_compilation_cache")

TOKENS = 2048
CFG = dataclasses.replace(PRESETS["Qwen2-0.5B"], layers=1, vocab=2048, d_model=256, d_ff=512, heads=4, kv_heads=2)


@pytest.mark.parametrize("topology, mesh, kernel", [("v5e:2x2", "context=2,tensor=2", True),
                                                    ("v2:2x2", "data=8", False)])
def test_the_kernel_for_the_chip(topology, mesh, kernel):
    mesh = make_mesh(mesh, tpu_devices(topology))

    def local(params, ids_BT, *, ax):
        ax, ids_BT = balance(ax, ids_BT)
        out = Decoder(CFG, ax, jnp.bfloat16, remat="full").apply({"params": params}, ids_BT)
        logprob_BT, _, _ = target_logprobs(out.x_BTD, out.head["table"], ids_BT, out.vocab)
        return ax.psum(-logprob_BT.sum(), ("data", "context"))

    specs = param_specs(CFG, mesh)
    loss = per_device(local, mesh, (specs, TOKENS_SPEC), REPLICATED)
    params = jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
                          abstract_params(CFG), shardings(specs, mesh))
    ids = jax.ShapeDtypeStruct((8, TOKENS), jnp.int32, sharding=shardings(TOKENS_SPEC, mesh))
    compiled = jax.jit(jax.grad(loss)).lower(params, ids).compile()
    assert ("splash_mha" in compiled.as_text()) == kernel
    if kernel:
        scores = CFG.heads * TOKENS * TOKENS * 4
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * scores, "of up to four rows on a device"
