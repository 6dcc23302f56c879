"""Compiler options, all in one place, with the reason for each; and whether anything was compiled at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

CPU_SERVING: dict[str, Any] = {
    # YNNPACK's reductions split a sum by the number of rows, so that a row's last bits depend on its batch; XLA's own
    # do not. Matrix products stay with YNNPACK, whose rows are equal from two rows on (ops/dot.py). Measured with JAX
    # 0.10.2: tests/serve/test_batch_independence.py fails without it.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


_events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def compile_serving(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """(a program for generation and scoring, compiled with what this platform needs; whether it came from the
    persistent cache)."""
    before = _events["/jax/compilation_cache/cache_hits"]
    compiled = _compile(lowered)
    return compiled, _events["/jax/compilation_cache/cache_hits"] > before


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_SERVING)
    except Exception as error:
        # The option is experimental: a version of XLA without it compiles as it sees fit.
        if "xla_cpu_experimental_ynn_fusion_type" not in str(error):
            raise
        return lowered.compile()
