"""How many tokens a model takes, and what happens to a request that has more."""

from __future__ import annotations

from typing import Literal

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError


class Limits:
    """A model's context in tokens, `ModelConfig.longest_context`, and what a request may ask of it."""

    def __init__(self, cfg: ModelConfig):
        self._rope = cfg.rope
        self.context = cfg.longest_context
        self._reason = ""
        if cfg.dual_chunk is not None and cfg.longest_context < cfg.max_position:
            self._reason = " (dual_chunk_attention_config.chunk_size; dual chunk attention beyond it is not supported)"

    def check(self, prompt: int, new: int, what: str) -> None:
        """Raises UserError with the numbers when prompt and new tokens do not fit."""
        if prompt + new > self.context:
            total = f"{prompt} prompt tokens and {new} new ones, {prompt + new} together" if new else f"{prompt} tokens"
            raise UserError(f"{what} has {total}; the model's context is {self.context}{self._reason}")

    def fit(self, ids: list[int], new: int, what: str, truncate: Literal["left"] | None) -> tuple[list[int], int]:
        """(ids, how many were dropped in front). With truncate="left" the prompt's last tokens that fit are kept."""
        over = len(ids) + new - self.context
        if over <= 0:
            return ids, 0
        if truncate is None or over >= len(ids):
            self.check(len(ids), new, what)
        return ids[over:], over

    def default_new(self, prompt: int, wanted: int) -> int:
        """New tokens for a request that does not say: `wanted`, or what is left of the context, but at least one."""
        return max(1, min(wanted, self.context - prompt))

    def is_long(self, tokens: int) -> bool:
        """Whether a request of so many tokens in all needs the scaled RoPE when the model scales long ones only."""
        original = self._rope.original_max_position
        return original is not None and tokens > original
