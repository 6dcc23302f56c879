"""AdamW as Qwen2-style runs use it: clipped by global norm, warmed up, decayed only where weights multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen2_jax.optim.moments import MomentDtype, stored_in
from qwen2_jax.optim.schedules import ScheduleConfig, need_choice, need_positive, need_range, schedule
from qwen2_jax.shapes import logical_axes


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(ScheduleConfig):
    """Decoupled weight decay (Loshchilov and Hutter 2019): p ← p - lr (m̂ / (√v̂ + eps) + weight_decay p)."""

    b1: float = 0.9
    """Share of the first moment that is kept each update."""
    b2: float = 0.95
    """Share of the second moment that is kept each update."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Times learning rate and weight, taken off matrices and embeddings; not off biases and norm scales."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; none: no clipping."""
    moments: MomentDtype = "float32"
    """What moments are stored in between updates; they are computed in float32. bfloat16 halves their memory."""

    def __post_init__(self):
        super().__post_init__()
        need_positive(self, "eps")
        need_range(self, "weight_decay", 0, math.inf, open_end=True)
        for name in ("b1", "b2"):
            need_range(self, name, 0, 1, open_end=True)
        if self.clip is not None:
            need_positive(self, "clip")
        need_choice(self, "moments", MomentDtype)

    def descent(self, where: Any = None) -> optax.GradientTransformation:
        """Clipped gradients → what the learning rate multiplies. `where` as in `make_optimizer`."""
        adam = stored_in(self.moments, optax.scale_by_adam(self.b1, self.b2, self.eps))
        return optax.chain(adam, optax.add_decayed_weights(self.weight_decay, mask=decays))


def make_optimizer(cfg: AdamWConfig, where: Any = None) -> optax.GradientTransformation:
    """Clip, AdamW or Muon (`optim.muon.MuonConfig`), schedule. Give it gradients of the mean loss, in global view.

    `where`: on a mesh, the shardings of the parameters, a tree like them; only Muon, which needs whole matrices, asks.
    Its `init` raises ValueError where a parameter is not float32: what an update adds to a weight is often less than
    half of the weight's last digit in bfloat16, and would be lost.
    """
    clip = optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip)
    descent = optax.chain(cfg.descent(where), optax.scale_by_learning_rate(schedule(cfg)))
    inner = optax.chain(clip, descent)

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.dtype != jnp.float32:
                raise ValueError(f"master weights are float32, found {leaf.dtype} at {jax.tree_util.keystr(path)}")
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)


def decays(params: dict) -> dict:
    """Whether each leaf is decayed: whatever has two logical axes of its own, so matrices and embeddings, and neither
    biases nor norm scales. The groups of transformers' Trainer.

    The shape does not tell: a stacked bias has two dimensions, as a matrix has.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: len(axes_of(path)) >= 2, params)


def axes_of(path: tuple) -> tuple[str, ...]:
    """Logical axes of the parameter at a path of JAX's, without `layers`."""
    return tuple(a for a in logical_axes("/".join(part.key for part in path)) if a != "layers")
