"""Compiler options, all in one place, with the reason for each; and whether anything was compiled at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger("qwen2_jax")

CPU_SERVING: Mapping[str, Any] = {
    # YNNPACK's reductions split a sum by the number of rows, so that a row's last bits depend on its batch; XLA's own
    # do not. Matrix products stay with YNNPACK, whose rows are equal from two rows on (ops/dot.py). Measured with JAX
    # 0.10.2: tests/serve/test_batch_independence.py fails without it.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
TPU_SERVING: Mapping[str, Any] = {
    # Products group by group. Without it some versions of libtpu multiply every row with every expert: 64 times the
    # work for 64 experts (tests/tpu_aot/test_grouped.py).
    "xla_tpu_enable_ragged_dot_kernel": True,
}
TPU_TRAINING: Mapping[str, Any] = {
    **TPU_SERVING,
    # A gather goes on inside of the fusions of the products that run meanwhile. v5e does so by itself; on v5p and v6e
    # everything waits for each gather without these (docs/tpu_performance.md, 16).
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Over three dimensions of a torus the compiler otherwise makes a gather into a sum of zeros with each device's
    # piece: twice the bytes, and everything waits.
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    # Otherwise a stack of float32 weights, of which each layer casts its own, is cast whole before the scan, and the
    # copy kept throughout the step (docs/tpu_performance.md, 30).
    "xla_jf_bf16_propagation": False,
}
SCOPED_VMEM_KIB: Mapping[str, int] = {
    # Of 128 MiB of vector memory the compiler takes 16 for the tiles of a fusion, unless told; with more, products read
    # their operands less often (docs/tpu_performance.md, 12), and it searches longer: half as long again for twice the
    # tiles, more than twice as long for four times, which v5e does not need.
    "TPU v5 lite": 32768,
    "TPU v5": 65536,
    "TPU v6 lite": 65536,
}
"""Kind of device → KiB."""


def training_options(mesh: Mesh | None) -> dict[str, Any]:
    """What `jax.jit` of a training step takes as `compiler_options`; without a mesh, for the default device."""
    options = dict(TPU_TRAINING)
    if size := SCOPED_VMEM_KIB.get(_device(mesh).device_kind):
        options["xla_tpu_scoped_vmem_limit_kib"] = size
    return _known({"tpu": options}, mesh)


def serving_options(mesh: Mesh | None) -> dict[str, Any]:
    """The same for generation and scoring."""
    return _known({"tpu": TPU_SERVING, "cpu": CPU_SERVING}, mesh)


def _device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


_refused: dict[tuple[str, str], bool] = {}


def _known(options: Mapping[str, Mapping[str, Any]], mesh: Mesh | None) -> dict[str, Any]:
    """Those options of the platform that this version of the compiler knows: they are no part of anyone's interface,
    and a version without one compiles as it sees fit."""
    device = _device(mesh)
    return {name: value for name, value in options.get(device.platform, {}).items()
            if not _is_refused(name, value, device)}


def _is_refused(name: str, value: Any, device: Any) -> bool:
    key = (device.platform, name)
    if key not in _refused:
        where = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
        lowered = jax.jit(lambda: jnp.zeros(()), out_shardings=where).lower()
        try:
            lowered.compile(compiler_options={name: value})
            _refused[key] = False
        except Exception as error:
            if name not in str(error):
                raise
            log.warning("this version of the compiler has no option %s; going on without it", name)
            _refused[key] = True
    return _refused[key]


_events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def compile_serving(lowered: jax.stages.Lowered, mesh: Mesh | None) -> tuple[jax.stages.Compiled, bool]:
    """(a program for generation and scoring, compiled with what its devices need; whether it came from the persistent
    cache)."""
    options = serving_options(mesh)
    before = _events["/jax/compilation_cache/cache_hits"]
    compiled = lowered.compile(compiler_options=options)
    return compiled, _events["/jax/compilation_cache/cache_hits"] > before
