"""Expert parallelism by exchange: a row travels to the devices that hold its experts, and to no others.

Shape letters: R rows of this device, k choices a row, n devices along `expert`. A row that several of a device's
experts want travels there once, with its weights; they are added up there, and one sum travels back. So no more travels
than when all rows are gathered everywhere, and less than a copy for each choice would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.grouped import collect, sorted_copies, spread
from qwen2_jax.shapes import least_divisor
from qwen2_jax.sharding.axes import EXPERT, Axes

ExpertExchange = Literal["auto", "gather", "all_to_all"]
"""How tokens reach their experts on a mesh with `expert`: all to all devices (`gather`), or each to those that hold its
experts (`all_to_all`); `auto` takes the latter on TPU where these devices are more than a token has choices."""


def exchanged(experts: Callable, here: int, x_RD, weight_Rk, expert_Rk, ax: Axes):
    """Sum over choices of weight * expert, float32 [R, D], wherever the experts are: those numbered from
    `here` times this device's place along `expert` on are its own.

    `experts(x_RD, weight_Rk, expert_Rk)` is what they make of any rows, their own number in `expert_Rk` counted from 0
    and those of others `here` or more. Results travel in x's dtype. Nothing is dropped: there is room for all rows of
    all devices; where devices are more than choices, the rows go in pieces, so that the room is that of k copies.
    """
    R, k = expert_Rk.shape
    pieces = least_divisor(R, -(-ax.size(EXPERT) // k))

    def piece(rows):
        x_rD, weight_rk, expert_rk = rows
        return _exchanged(experts, here, x_rD, weight_rk, expert_rk, ax)

    if pieces == 1:
        return piece((x_RD, weight_Rk, expert_Rk))
    split = jax.tree.map(lambda a: a.reshape(pieces, R // pieces, -1), (x_RD, weight_Rk, expert_Rk))
    return lax.map(jax.checkpoint(piece), split).reshape(R, -1)


def _exchanged(experts: Callable, here: int, x_RD, weight_Rk, expert_Rk, ax: Axes):
    (R, k), n = expert_Rk.shape, ax.size(EXPERT)
    # Of the choices on one device, the first stands for all.
    device_Rk = expert_Rk // here
    again_Rk = jnp.stack([jnp.any(device_Rk[:, :i] == device_Rk[:, i:i + 1], axis=1) for i in range(k)], axis=1)
    copies = sorted_copies(jnp.where(again_Rk, n, device_Rk), n)
    room = R * min(k, n)
    sent = copies._replace(copy_C=copies.copy_C[:room])
    tree = tuple(spread(a, sent) for a in (x_RD, weight_Rk, expert_Rk))
    counts_nn = ax.gather(copies.sizes_E[None], EXPERT, 0)
    x_MD, weight_Mk, expert_Mk = ax.exchange(tree, counts_nn, EXPERT, n * R, most=R)
    own_Mk = expert_Mk - ax.index(EXPERT) * here
    filled_M = jnp.arange(n * R, dtype=jnp.int32) < counts_nn[:, ax.index(EXPERT)].sum()
    own_Mk = jnp.where((own_Mk >= 0) & filled_M[:, None], own_Mk, here)
    y_MD = experts(x_MD, weight_Mk, own_Mk).astype(x_RD.dtype)
    y_CD = ax.exchange(y_MD, counts_nn.T, EXPERT, room, most=R)
    return collect(y_CD, sent)
