"""Shapes of every parameter, and what they add up to, from a `ModelConfig` alone. Standard library only.

The tree is the one of docs/architecture.md; the modules in `model/` declare the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qwen2_jax.config import ModelConfig


@dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters.

    `non_embedding` leaves out the embedding table and, when it is separate, the vocabulary head. `active` is what one
    token passes through: of the routed experts only the `top_k` chosen ones.
    """

    total: int
    non_embedding: int
    active: int
    active_non_embedding: int


MATRICES = frozenset({"table", "q", "k", "v", "o", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"})
"""Names of the parameters that weight-only quantization takes: embedding and vocabulary head, attention, feed-forward,
experts. Not biases, norms, routers and reward heads: they are small, and much hangs on them."""


def is_quantized(path: str) -> bool:
    """Whether quantization takes the parameter at this path (its last part is enough)."""
    return path.rpartition("/")[2] in MATRICES


AXES: Mapping[str, tuple[str, ...]] = {
    "embed/table": ("vocab", "embed"), "head/table": ("vocab", "embed"),
    "attn_norm/scale": ("norm",), "mlp_norm/scale": ("norm",), "norm/scale": ("norm",),
    "attn/q": ("heads", "embed"), "attn/q_bias": ("heads",),
    "attn/k": ("kv_heads", "embed"), "attn/k_bias": ("kv_heads",),
    "attn/v": ("kv_heads", "embed"), "attn/v_bias": ("kv_heads",),
    "attn/o": ("embed", "heads"),
    "mlp/gate": ("ffn", "embed"), "mlp/up": ("ffn", "embed"), "mlp/down": ("embed", "ffn"),
    "moe/router": ("router", "embed"), "moe/shared_router": ("router", "embed"),
    "moe/gate": ("expert", "expert_ffn", "embed"), "moe/up": ("expert", "expert_ffn", "embed"),
    "moe/down": ("expert", "embed", "expert_ffn"),
    "moe/shared_gate": ("shared_ffn", "embed"), "moe/shared_up": ("shared_ffn", "embed"),
    "moe/shared_down": ("embed", "shared_ffn"),
    "score/weight": ("label", "embed"),
    "reward/dense1": ("hidden", "embed"), "reward/dense1_bias": ("hidden",),
    "reward/dense2": ("label", "hidden"), "reward/dense2_bias": ("label",),
}
"""Last two parts of a parameter's path → its logical axes, as the modules in `model/` declare them."""


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of the parameter at this path, "layers" first for those of a run, in either layout."""
    name = "/".join(path.split("/")[-2:])
    if name not in AXES:
        raise ValueError(f"no logical axes are known of a parameter {path}: add them to shapes.AXES")
    return (("layers",) if path.startswith("layers_") else ()) + AXES[name]


def param_shapes(cfg: ModelConfig, *, stacked: bool = True) -> dict[str, tuple[int, ...]]:
    """Path → global shape of every parameter, in the order of the forward pass.

    `stacked` as in `ModelConfig.layer_runs`: one stack a run of equal layers, or one of length 1 a layer.
    """
    D = cfg.d_model
    shapes: dict[str, tuple[int, ...]] = {"embed/table": (cfg.vocab, D)}
    for run in cfg.layer_runs(stacked=stacked):
        layer = _attention(cfg) | (_sparse(cfg) if run.sparse else _dense(cfg))
        shapes |= {f"{run.name}/{path}": (run.length, *shape) for path, shape in layer.items()}
    shapes["norm/scale"] = (D,)
    if cfg.head == "lm" and not cfg.tied_head:
        shapes["head/table"] = (cfg.vocab, D)
    elif cfg.head == "score":
        shapes["score/weight"] = (cfg.labels, D)
    elif cfg.head == "reward":
        shapes |= {"reward/dense1": (D, D), "reward/dense1_bias": (D,)}
        shapes |= {"reward/dense2": (1, D), "reward/dense2_bias": (1,)}
    return shapes


def count_params(cfg: ModelConfig) -> ParamCount:
    """Numbers of parameters of the model with its own head, each stored tensor once."""
    sizes = {path: math.prod(shape) for path, shape in param_shapes(cfg).items()}
    total = sum(sizes.values())
    embedding = sizes["embed/table"] + sizes.get("head/table", 0)
    idle = 0
    if cfg.moe is not None:
        routed = sum(size for path, size in sizes.items() if path.endswith(("moe/gate", "moe/up", "moe/down")))
        idle = routed // cfg.moe.experts * (cfg.moe.experts - cfg.moe.top_k)
    return ParamCount(total, total - embedding, total - idle, total - embedding - idle)


def kv_bytes_per_token(cfg: ModelConfig, *, itemsize: int = 2) -> int:
    """Bytes that one token adds to the cache, keys and values of all layers; `itemsize` 2 is bfloat16."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * itemsize


def _attention(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, NH, KH = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    return {
        "attn_norm/scale": (D,),
        "attn/q": (NH, D), "attn/q_bias": (NH,),
        "attn/k": (KH, D), "attn/k_bias": (KH,),
        "attn/v": (KH, D), "attn/v_bias": (KH,),
        "attn/o": (D, NH),
        "mlp_norm/scale": (D,),
    }


def _dense(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F = cfg.d_model, cfg.d_ff
    return {"mlp/gate": (F, D), "mlp/up": (F, D), "mlp/down": (D, F)}


def _sparse(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert cfg.moe is not None
    D, E, F, Fs = cfg.d_model, cfg.moe.experts, cfg.moe.d_expert, cfg.moe.d_shared
    return {
        "moe/router": (E, D),
        "moe/gate": (E, F, D), "moe/up": (E, F, D), "moe/down": (E, D, F),
        "moe/shared_gate": (Fs, D), "moe/shared_up": (Fs, D), "moe/shared_down": (D, Fs),
        "moe/shared_router": (1, D),
    }


def least_divisor(size: int, least: int) -> int:
    """The smallest divisor of `size` that is `least` or more; `size` where `least` is beyond it."""
    return next(n for n in range(min(least, size), size + 1) if size % n == 0)
