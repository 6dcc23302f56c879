"""What a checkpoint's generation_config.json says about sampling, and what a caller's arguments make of it."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.json_fields import Fields, is_whole, read_object
from qwen2_jax.errors import UserError
from qwen2_jax.serve.scheduler import Sampling

MAX_NEW_TOKENS = 256
"""Where neither the caller nor the checkpoint says how much to generate."""


GREEDY, PLAIN = Sampling(), Sampling(temperature=1.0)


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings used where the caller gives none. A value that the file leaves out is off."""

    sampling: Sampling = GREEDY
    sampled: Sampling = PLAIN
    """The file's settings as they are when sampling, also where the file itself says not to sample."""
    max_new_tokens: int = MAX_NEW_TOKENS
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> GenerationDefaults:
        """From `generation_config.json` of a checkpoint's folder; plain defaults when there is none.

        As in transformers, `temperature` and the filters count only where `do_sample` is true. Raises UserError naming
        the file and the field.
        """
        path = folder / "generation_config.json"
        if not path.exists():
            return cls()
        fields = Fields(read_object(path), f"{path}: ")
        stop = fields.data.get("eos_token_id")
        stop = (fields.whole("eos_token_id"),) if is_whole(stop) else fields.list_of(int, "eos_token_id", ())
        penalty = fields.number("repetition_penalty", 1.0)
        sampled = Sampling(temperature=fields.number("temperature", 1.0), top_k=fields.whole("top_k", 0),
                           top_p=fields.number("top_p", 1.0), repetition_penalty=penalty)
        check_sampling(sampled, f"{path}: ")
        sampling = sampled if fields.flag("do_sample", False) else Sampling(repetition_penalty=penalty)
        return cls(sampling, sampled, fields.whole("max_new_tokens", MAX_NEW_TOKENS), stop)

    def choose(self, *, temperature: float | None, top_p: float | None, top_k: int | None,
               repetition_penalty: float | None) -> Sampling:
        """The caller's arguments where given, else the file's settings. A temperature decides whether to sample."""
        base = self.sampling if temperature is None else self.sampled
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        sampling = dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})
        check_sampling(sampling)
        return sampling


def check_sampling(s: Sampling, where: str = "") -> None:
    """Raises UserError for a setting outside its range, NaN included."""
    def need(ok: bool, name: str, value: float, what: str) -> None:
        if not ok:
            raise UserError(f"{where}{name} must be {what}, found {value}")

    need(math.isfinite(s.temperature) and s.temperature >= 0, "temperature", s.temperature,
         "a number of at least 0 (0 is greedy)")
    need(0 <= s.top_p <= 1, "top_p", s.top_p, "between 0 and 1")
    need(0 <= s.top_k < 2**31, "top_k", s.top_k, "a whole number of at least 0 (0 is off)")
    need(math.isfinite(s.repetition_penalty) and s.repetition_penalty > 0, "repetition_penalty", s.repetition_penalty,
         "a positive number (1 is off)")


def whole(name: str, value: Any, *, least: int) -> int:
    """`value` as an int; UserError when it is none, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, found {value!r}")
    return int(value)


def check_seed(seed: Any) -> int:
    """The seed, or a fresh one where there is none."""
    if seed is None:
        return secrets.randbits(32)
    if whole("seed", seed, least=0) >= 2**32:
        raise UserError(f"seed must be below 4294967296, found {seed}")
    return int(seed)


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; UserError for an empty one, which would stop everywhere."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for s in stop:
        if not isinstance(s, str) or not s:
            raise UserError(f"stop strings must be texts of at least one character, found {s!r}")
    return stop
