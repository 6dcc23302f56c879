"""Learning rates by update: a linear warm-up, then cosine, linear, WSD or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import optax

from qwen2_jax.errors import UserError

ScheduleKind = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate of each update.

    It rises linearly over `warmup` updates to `peak`, then falls to `final` times peak at update `steps`: `cosine` and
    `linear` from the end of the warm-up, `wsd` (warm-up, stable, decay: MiniCPM, section 4) linearly over the last
    `decay` updates; `constant` stays.
    """

    peak: float
    """Highest learning rate."""
    steps: int | None = None
    """Updates until the rate has fallen to its end; none: as many as the run makes."""
    warmup: int = 0
    """Updates over which it rises; the first has peak / warmup, not 0."""
    schedule: ScheduleKind = "cosine"
    """Form of the fall."""
    final: float = 0.1
    """Rate at the end, as a share of peak; `constant` does not fall."""
    decay: int = 0
    """Updates over which `wsd` falls; the others do not read it."""

    def __post_init__(self):
        need_choice(self, "schedule", ScheduleKind)
        need_positive(self, "peak")
        need_range(self, "final", 0, 1)
        need_whole(self, "warmup", 0)
        need_whole(self, "decay", 0)
        if self.steps is None:
            return
        need_whole(self, "steps", 1)
        need(self.warmup <= self.steps, f"warmup {self.warmup} must lie between 0 and steps {self.steps}")
        if self.schedule == "wsd":
            need(1 <= self.decay <= self.steps - self.warmup,
                 f"wsd needs decay between 1 and steps - warmup = {self.steps - self.warmup}, found {self.decay}")


def schedule(cfg: ScheduleConfig) -> optax.Schedule:
    """Learning rate of the update numbered n, from 0."""
    if cfg.steps is None:
        raise ValueError("a schedule needs the number of its updates: steps is none")
    w, last, steps = cfg.warmup, cfg.final * cfg.peak, cfg.steps
    after = max(steps - w, 1)

    def rate(n):
        n = jnp.asarray(n, jnp.float32)
        warm = cfg.peak * (n + 1) / max(w, 1)
        if cfg.schedule == "wsd":
            done = jnp.clip((n - (steps - cfg.decay)) / cfg.decay, 0, 1)
        else:
            done = jnp.clip((n - w) / after, 0, 1)
        if cfg.schedule == "constant":
            done = jnp.zeros_like(done)
        share = (1 - jnp.cos(jnp.pi * done)) / 2 if cfg.schedule == "cosine" else done
        return jnp.where(n < w, warm, cfg.peak + (last - cfg.peak) * share)

    return rate


def need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def need_positive(cfg, name: str) -> None:
    value = getattr(cfg, name)
    need(_is_number(value) and 0 < value < math.inf, f"{name} must be a positive number, found {value!r}")


def need_range(cfg, name: str, low: float, high: float, *, open_end: bool = False) -> None:
    """`low` ≤ value ≤ `high`, or with `open_end` < `high`."""
    value = getattr(cfg, name)
    fits = _is_number(value) and low <= value <= high and not (open_end and value == high)
    bounds = f"at least {low}" if high == math.inf else f"at least {low} and below {high}" if open_end \
        else f"between {low} and {high}"
    need(fits, f"{name} must be {bounds}, found {value!r}")


def need_whole(cfg, name: str, least: int) -> None:
    value = getattr(cfg, name)
    need(isinstance(value, int) and not isinstance(value, bool) and value >= least,
         f"{name} must be a whole number of at least {least}, found {value!r}")


def need_choice(cfg, name: str, choices) -> None:
    value = getattr(cfg, name)
    need(value in get_args(choices), f"{name} '{value}' is not supported: {', '.join(get_args(choices))} are")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
