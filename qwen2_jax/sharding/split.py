"""Stepping out of the residual stream into a half block that is split over tensor, and back.

Between blocks a device holds tokens `t` of its row: the row is split over context and, where whole rows are run, over
tensor as well (sequence parallelism, Korthikanti et al. 2022, arXiv 2205.05198). A half that is split over tensor by
heads or by width takes all tokens `T` of its piece of the context on each device along tensor, and leaves a sum to be
taken over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from qwen2_jax.config import ModelConfig
from qwen2_jax.sharding.axes import ONE_DEVICE, TENSOR, Axes
from qwen2_jax.sharding.rules import Rules


@jax.tree_util.register_static
@dataclass(frozen=True)
class Split:
    """One half block's way over the mesh: `over` is the axis that splits its weights, () where they are whole."""

    ax: Axes = ONE_DEVICE
    over: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    """Of the vocabulary's: axes over which its rows lie until they are used (ops/vocab.py)."""

    @classmethod
    def of(cls, cfg: ModelConfig, ax: Axes, logical: str) -> Split:
        """How the weights with the logical axis `logical` are split."""
        return cls(ax, Rules.of(cfg, ax).split_over(logical))

    @property
    def gathers(self) -> bool:
        """Whether the tokens that come in are split over the axis that splits the weights."""
        return bool(self.over) and set(self.over) <= set(self.ax.tokens)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Axes that split the tokens of a row inside of the half."""
        return tuple(name for name in self.ax.tokens if name not in self.over)

    def enter(self, x_BtD):
        """→ [B, T, D]."""
        return self.ax.gather(x_BtD, self.over, 1) if self.gathers else self.ax.vary(x_BtD, self.over)

    def leave(self, y_BTD):
        """Sum over the devices along `over` → [B, t, D]."""
        return self.ax.scatter(y_BTD, self.over, 1) if self.gathers else self.ax.psum(y_BTD, self.over)

    def inside(self, x_BT):
        """What belongs to the tokens inside, [B, T, …] or [B, t, …], of what belongs to the context's piece [B, T, …].
        """
        return self.ax.piece(x_BT, self._rest, 1)

    def of_row(self, x_BT):
        """What belongs to all tokens of the row, [B, S, …], of what belongs to those inside."""
        return self.ax.gather(x_BT, self.tokens, 1)

    def joined(self, x_Bt):
        """The other way: the context's piece [B, T, …], one value for all of tensor's devices."""
        return self.ax.gather_same(x_Bt, self._rest, 1)

    @property
    def _rest(self) -> tuple[str, ...]:
        return tuple(name for name in self.tokens if name in TENSOR)


WHOLE = Split()
