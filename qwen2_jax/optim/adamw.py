"""AdamW as Qwen2-style runs use it: clipped by global norm, warmed up, decayed only where weights multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from qwen2_jax.errors import UserError

ScheduleKind = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Decoupled weight decay (Loshchilov and Hutter 2019): p ← p - lr (m̂ / (√v̂ + eps) + weight_decay p).

    The rate rises linearly over `warmup` steps to `peak`, then falls to `final` times peak at step `steps`: `cosine`
    and `linear` from the end of the warmup, `wsd` (warmup, stable, decay) linearly over the last `decay` steps;
    `constant` stays. `clip` is the largest global gradient norm, None for no clipping.
    """

    peak: float
    steps: int
    warmup: int = 0
    schedule: ScheduleKind = "cosine"
    final: float = 0.1
    decay: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self):
        _need(self.schedule in get_args(ScheduleKind),
              f"schedule '{self.schedule}' is not supported: {', '.join(get_args(ScheduleKind))} are")
        for name in ("peak", "eps"):
            _need(0 < getattr(self, name) < math.inf, f"{name} must be a positive number, found {getattr(self, name)}")
        _need(0 <= self.weight_decay < math.inf, f"weight_decay must be at least 0, found {self.weight_decay}")
        for name in ("b1", "b2"):
            _need(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        _need(0 <= self.final <= 1, f"final must lie between 0 and 1, found {self.final}")
        _need(self.clip is None or 0 < self.clip < math.inf,
              f"clip must be a positive number or None, found {self.clip}")
        _need(self.steps >= 1, f"steps must be at least 1, found {self.steps}")
        _need(0 <= self.warmup <= self.steps, f"warmup {self.warmup} must lie between 0 and steps {self.steps}")
        if self.schedule == "wsd":
            _need(1 <= self.decay <= self.steps - self.warmup,
                  f"wsd needs decay between 1 and steps - warmup = {self.steps - self.warmup}, found {self.decay}")


def schedule(cfg: AdamWConfig) -> optax.Schedule:
    """Learning rate of the update numbered n, from 0. A warmup of w makes the first rate peak / w, not 0."""
    w, last = cfg.warmup, cfg.final * cfg.peak
    after = max(cfg.steps - w, 1)

    def rate(n):
        n = jnp.asarray(n, jnp.float32)
        warm = cfg.peak * (n + 1) / max(w, 1)
        if cfg.schedule == "wsd":
            done = jnp.clip((n - (cfg.steps - cfg.decay)) / cfg.decay, 0, 1)
        else:
            done = jnp.clip((n - w) / after, 0, 1)
        if cfg.schedule == "constant":
            done = jnp.zeros_like(done)
        share = (1 - jnp.cos(jnp.pi * done)) / 2 if cfg.schedule == "cosine" else done
        return jnp.where(n < w, warm, cfg.peak + (last - cfg.peak) * share)

    return rate


def make_optimizer(cfg: AdamWConfig) -> optax.GradientTransformation:
    """Clip, AdamW, schedule; moments in the parameters' dtype. Give it gradients of the mean loss, in global view."""
    clip = optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip)
    adamw = optax.adamw(schedule(cfg), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decays)
    return optax.chain(clip, adamw)


def decays(params: dict) -> dict:
    """Whether each leaf is decayed: matrices and embeddings are, biases and norm scales are not.

    The groups of transformers' Trainer. Told by name, because a stacked bias has two axes, as a matrix has.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_exempt(path[-1].key), params)


def _is_exempt(name: str) -> bool:
    return name == "scale" or name.endswith("bias")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
