"""The Qwen2 model family in JAX and Flax: `qwen2_jax.load(path_or_hub_id)` is the way in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.serve.lm import load

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def __getattr__(name: str):
    """`load` on first use, so that `import qwen2_jax` and `qwen2-jax --help` need not wait for JAX."""
    if name == "load":
        return importlib.import_module("qwen2_jax.serve.lm").load
    raise AttributeError(f"module 'qwen2_jax' has no attribute {name!r}")
