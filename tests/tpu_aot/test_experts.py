"""Experts on TPUs: the work of the rows that are there and no more, no copy of the weights, rows sent ragged."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen2_jax.ops.exchange import exchanged
from qwen2_jax.ops.experts import ExpertWeights, grouped_experts
from qwen2_jax.ops.grouped_matmul import TILE_ROWS
from qwen2_jax.sharding.axes import BATCH, EXPERT
from qwen2_jax.sharding.compiler import TPU_TRAINING, training_options
from qwen2_jax.sharding.mesh import BATCH_SPEC, make_mesh, per_device, shardings
from tests.tpu_aot.topologies import tpu_devices

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
pytestmark = [pytest.mark.usefixtures("no_compilation_cache"), pytest.mark.slow]

R, K, E, D, F = 512, 4, 16, 1024, 1024
MOST_WORK = 1.05
"""Of the products' FLOPs, what is compiled: the rest is what lies between them."""
WEIGHTS = 3 * E * F * D * 2


def compiled(topology: str, spec: str, experts):
    """Value and gradients of `experts(x, weight, expert, w, ax=)`, sharded as in the model."""
    mesh = make_mesh(spec, tpu_devices(topology))
    specs = (BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, P(EXPERT))
    mapped = per_device(experts, mesh, specs, BATCH_SPEC)
    shapes = [((R, D), jnp.bfloat16), ((R, K), jnp.float32), ((R, K), jnp.int32)]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=shardings(BATCH_SPEC, mesh)) for shape, dtype in shapes]
    w = ExpertWeights(*(jax.ShapeDtypeStruct((E, *s), jnp.bfloat16, sharding=shardings(P(EXPERT), mesh))
                        for s in ((F, D), (F, D), (D, F))))

    def both(x, weight, expert, w):
        y, back = jax.vjp(lambda x, weight, w: mapped(x, weight, expert, w), x, weight, w)
        return back(y)

    return jax.jit(both, compiler_options=training_options(mesh)).lower(*args, w).compile()


def on_one_device(x_RD, weight_Rk, expert_Rk, w, *, ax):
    return grouped_experts(x_RD, weight_Rk, expert_Rk, ExpertWeights(*(ax.vary(m, BATCH) for m in w)), ax=ax)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_do_the_work_once(topology):
    done = compiled(topology, "data=1", on_one_device)
    exact = 9 * 2 * R * K * D * F
    assert exact <= done.cost_analysis()["flops"] <= MOST_WORK * exact
    assert done.memory_analysis().temp_size_in_bytes < WEIGHTS / 3


def test_loops_over_tiles_widen_no_weights():
    """The compiler counts what a loop does once; how often it goes round is the next test's."""
    done = compiled("v2:2x2", "data=1", on_one_device)
    assert done.cost_analysis()["flops"] <= MOST_WORK * 9 * 2 * TILE_ROWS * D * F
    assert done.memory_analysis().temp_size_in_bytes < 2 * WEIGHTS / 3, "one of the three, in float32"


def test_tiles_are_nearly_full():
    """With 16,384 rows of the 57B on a device, routed at random."""
    rows, experts, top_k = 16384, 64, 8
    sizes = np.random.default_rng(0).multinomial(rows * top_k, np.full(experts, 1 / experts))
    assert np.sum(-(-sizes // TILE_ROWS)) * TILE_ROWS <= MOST_WORK * rows * top_k


@pytest.mark.parametrize("topology", ["v2:2x2", "v5e:2x2"])
def test_rows_are_sent_ragged(topology):
    def experts(x, weight, expert, w, *, ax):
        here = E // ax.size(EXPERT)
        return exchanged(partial(grouped_experts, w=w, ax=ax, share=here / E), here, x, weight, expert, ax)

    text = compiled(topology, "expert=4", experts).as_text()
    assert "ragged-all-to-all" in text and " all-to-all(" not in text


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch, caplog):
    monkeypatch.setitem(TPU_TRAINING, "xla_tpu_no_such_option", True)
    found = {kind: training_options(make_mesh("data=1", tpu_devices(kind))) for kind in ("v2:2x2", "v5e:2x2")}
    known = {name: value for name, value in TPU_TRAINING.items() if name != "xla_tpu_no_such_option"}
    assert found == {"v2:2x2": known, "v5e:2x2": {**known, "xla_tpu_scoped_vmem_limit_kib": 32768}}
    assert "xla_tpu_no_such_option" in caplog.text
