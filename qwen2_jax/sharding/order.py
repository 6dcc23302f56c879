"""Which tokens of a row each device holds, where a row is split.

Causal attention costs a token as much as it has tokens before it, so equal pieces in order would leave the device with
a row's beginning idle while the last one works. In *balanced* order the row is cut into twice as many pieces as devices
along `context`, and device d holds the d-th from the front and the d-th from the back: all have the same to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.sharding.axes import CONTEXT, Axes


@dataclass(frozen=True)
class RowOrder:
    """Of the tokens inside of one half block: device `piece` of `pieces` holds the piece-th part of the row as
    `slots_of` orders it."""

    pieces: int
    piece: Any
    """This device's number, int32, may be traced."""
    halves: int
    """Parts that the row is cut into for balance: two a device along context; 0 where the tokens lie in order."""

    @classmethod
    def of(cls, ax: Axes, names: tuple[str, ...]) -> RowOrder:
        """Where `names` split the tokens."""
        return cls(ax.size(names), ax.index(names), _halves(ax))

    @staticmethod
    def slots_of(tokens: int, halves: int) -> np.ndarray:
        """int32 [tokens]: where in the row each token stands, device after device."""
        slots = np.arange(tokens, dtype=np.int32)
        return slots.reshape(halves, -1)[_held(halves)].reshape(-1) if halves else slots

    def in_order(self, x_BS):
        """The whole row's [B, S, …], device after device, as the row has it."""
        if not self.halves:
            return x_BS
        B, S, *rest = x_BS.shape
        parts = x_BS.reshape(B, self.halves, S // self.halves, *rest)
        return jnp.take(parts, np.argsort(_held(self.halves)), axis=1).reshape(x_BS.shape)


def _halves(ax: Axes) -> int:
    return 2 * ax.size(CONTEXT) if ax.balanced else 0


def _held(halves: int) -> np.ndarray:
    """Numbers of the parts, device after device: 0, last, 1, last but one, …"""
    return np.stack([np.arange(halves // 2), halves - 1 - np.arange(halves // 2)], axis=1).reshape(-1)


def row_slots(ax: Axes, tokens: int):
    """int32 [tokens]: where in their row this device's tokens along `context` stand."""
    index, slots = ax.index(CONTEXT), jnp.arange(tokens, dtype=jnp.int32)
    if not (halves := _halves(ax)):
        return index * tokens + slots
    half = tokens // 2
    return jnp.where(slots < half, index * half + slots, (halves - 2 - index) * half + slots)


def balance(ax: Axes, tree: Any) -> tuple[Axes, Any]:
    """(the mesh with rows in balanced order, the arrays [B, T, …] of this device's tokens in it), of arrays that lie in
    order. Where `context` has one device, or T is odd, nothing changes."""
    size = ax.size(CONTEXT)
    if size == 1 or any(leaf.shape[1] % 2 for leaf in jax.tree.leaves(tree)):
        return ax, tree
    # Device s holds parts 2s and 2s+1; part p belongs to device p, or counted from the back.
    owner = [min(p, 2 * size - 1 - p) for p in range(2 * size)]
    even_first = ax.index(CONTEXT) % 2 == 0

    def exchange(x_BT):
        parts = x_BT.reshape(x_BT.shape[0], 2, -1, *x_BT.shape[2:])
        even, odd = (ax.permute(parts[:, i], CONTEXT, [(s, owner[2 * s + i]) for s in range(size)]) for i in (0, 1))
        front, back = jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)
        return jnp.concatenate([front, back], axis=1)

    return ax.in_balance(), jax.tree.map(exchange, tree)
