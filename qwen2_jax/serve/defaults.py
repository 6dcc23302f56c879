"""What a checkpoint's generation_config.json says about sampling, and what a caller's arguments make of it."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.json_fields import Fields, is_number, is_whole, read_object, shown
from qwen2_jax.errors import UserError
from qwen2_jax.serve.scheduler import Sampling

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Where neither the caller nor the checkpoint says how much to generate."""
LARGEST = float(np.finfo(np.float32).max)
PENALTIES = (1e-3, 1e3)

MOST_SAMPLES = 100_000
"""Most samples of one prompt in one call: each is kept in memory until all are done."""
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (0,), "min_new_tokens": (0,), "min_length": (0,), "num_beams": (1,), "min_p": (0,),
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (), "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,), "guidance_scale": (1,), "bad_words_ids": ([],), "sequence_bias": ([], {}),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": ([],),
    "exponential_decay_length_penalty": (), "stop_strings": ([],), "watermarking_config": (),
}
"""What else changes the tokens that transformers generates, and the values with which it does not."""
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
        for name, harmless in NOT_IMPLEMENTED.items():
            if fields.data.get(name) not in (None, False, *harmless):
                log.warning("%s: %s is not implemented and has no effect, found %s", path, name,
                            shown(fields.data[name]))
        single = is_whole(fields.data.get("eos_token_id"))
        stop: tuple[int, ...] = (
            (fields.whole("eos_token_id"),) if single else fields.list_of(int, "eos_token_id", ()))
        if not all(0 <= i < 2**31 for i in stop):
            raise fields.refuse("eos_token_id", "token ids, which are at least 0 and below 2**31")
        max_new_tokens = fields.whole("max_new_tokens", MAX_NEW_TOKENS)
        if max_new_tokens < 1:
            raise fields.refuse("max_new_tokens", "a whole number of at least 1")
        penalty = fields.number("repetition_penalty", 1.0)
        sampled = Sampling(temperature=fields.number("temperature", 1.0), top_k=fields.whole("top_k", 0),
                           top_p=fields.number("top_p", 1.0), repetition_penalty=penalty)
        check_sampling(sampled, f"{path}: ")
        sampling = sampled if fields.flag("do_sample", False) else Sampling(repetition_penalty=penalty)
        return cls(sampling, sampled, max_new_tokens, stop)

    def choose(self, *, temperature: float | None, top_p: float | None, top_k: int | None,
               repetition_penalty: float | None) -> Sampling:
        """The caller's arguments where given, else the file's settings. A temperature decides whether to sample."""
        base = self.sampling if temperature is None else self.sampled
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        sampling = dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})
        check_sampling(sampling)
        return sampling


def check_sampling(s: Sampling, where: str = "") -> None:
    """Raises UserError for a setting of another type or outside its range, NaN included."""
    def need(name: str, kind: Callable[[object], bool], least: float, most: float, what: str) -> None:
        value = getattr(s, name)
        value = value.item() if isinstance(value, np.generic) else value
        if not (kind(value) and least <= value <= most):
            raise UserError(f"{where}{name} must be {what}, found {value!r}")

    need("temperature", is_number, 0, LARGEST, "a number of at least 0 (0 is greedy)")
    need("top_p", is_number, 0, 1, "between 0 and 1")
    need("top_k", is_whole, 0, 2**31 - 1, "a whole number of at least 0 (0 is off)")
    least, most = PENALTIES
    need("repetition_penalty", is_number, least, most, f"a number between {least} and {most} (1 is off)")


def check_settings(*, max_new_tokens: int | None = None, temperature: float | None = None, top_p: float | None = None,
                   top_k: int | None = None, repetition_penalty: float | None = None,
                   stop: str | Sequence[str] | None = (), seed: int | None = None, n: int = 1,
                   truncate: str | None = None) -> None:
    """Raises UserError for an argument of `LM.generate` that no model could take."""
    GenerationDefaults().choose(temperature=temperature, top_p=top_p, top_k=top_k,
                                repetition_penalty=repetition_penalty)
    if max_new_tokens is not None:
        whole("max_new_tokens", max_new_tokens, least=0)
    if whole("n", n, least=1) > MOST_SAMPLES:
        raise UserError(f"n must be at most {MOST_SAMPLES} samples a prompt, found {n}")
    check_stop(stop)
    check_seed(seed)
    check_truncate(truncate)


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


def check_truncate(truncate: str | None) -> None:
    if truncate not in (None, "left"):
        raise UserError(f"truncate must be 'left' or None, found {truncate!r}")


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; None is none. UserError for an empty one, which would stop everywhere."""
    if not isinstance(stop, str | Sequence | None):
        raise UserError(f"stop must be a text or a list of texts, found {stop!r}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for s in stop:
        if not isinstance(s, str) or not s:
            raise UserError(f"stop strings must be texts of at least one character, found {s!r}")
        if any("\ud800" <= char <= "\udfff" for char in s):
            raise UserError(f"stop string {s!r} holds a lone surrogate, which no text of a model does")
    return stop
