"""Compiler options, all in one place, with the reason for each."""

from __future__ import annotations

from typing import Any

import jax

CPU_SERVING: dict[str, Any] = {
    # YNNPACK's reductions split a sum by the number of rows, so that a row's last bits depend on its batch; XLA's own
    # do not. Matrix products stay with YNNPACK, whose rows are equal from two rows on (ops/dot.py). Measured with JAX
    # 0.10.2: tests/serve/test_batch_independence.py fails without it.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def compile_serving(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program for generation and scoring with what this platform needs."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_SERVING)
    except Exception as error:
        # The option is experimental: a version of XLA without it compiles as it sees fit.
        if "xla_cpu_experimental_ynn_fusion_type" not in str(error):
            raise
        return lowered.compile()
