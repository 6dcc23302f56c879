"""Rows sorted by group, and working off the sorted rows in rounds.

Shape letters: R rows, k choices a row, E groups (experts). A *copy* is one (row, choice) pair, C = R k of them; S
copies of one round. The copies are sorted by group; a choice numbered E or more is of no group here: its copy comes
last, and nothing is read from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NOWHERE = jnp.iinfo(jnp.int32).max


class Copies(NamedTuple):
    """Copies in order of group, stable; or S of them, one after the other."""

    copy_C: jax.Array
    """Which (row, choice) each is: row * k + choice."""
    slot_Rk: jax.Array
    """Where each (row, choice) stands in the order; negative, or C or more, for one that is not among them."""
    ends_E: jax.Array
    """Behind the last copy of each group."""

    @property
    def row_C(self) -> jax.Array:
        return self.copy_C // self.slot_Rk.shape[1]

    @property
    def sizes_E(self) -> jax.Array:
        return jnp.diff(self.ends_E, prepend=jnp.zeros(1, jnp.int32))

    def part(self, start, size: int) -> Copies:
        """`size` copies from `start` on; it may reach beyond the last."""
        copy_C = jnp.pad(self.copy_C, (0, size))
        return Copies(lax.dynamic_slice_in_dim(copy_C, start, size), self.slot_Rk - start,
                      jnp.clip(self.ends_E - start, 0, size))


def sorted_copies(group_Rk, groups: int) -> Copies:
    group_C = group_Rk.reshape(-1)
    copy_C = jnp.argsort(group_C, stable=True).astype(jnp.int32)
    slot_C = jnp.argsort(copy_C).astype(jnp.int32)
    ends_E = jnp.sum(group_C[None] <= jnp.arange(groups, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    return Copies(copy_C, jnp.where(group_C < groups, slot_C, NOWHERE).reshape(group_Rk.shape), ends_E)


# Each of the two below is the other's derivative. Both read rows in a given order, which is fast everywhere; the
# automatic derivative of reading would write rows in an order that the compiler does not know.

@jax.custom_vjp
def spread(x_RD, copies: Copies):
    """Each copy's row, [C, D]."""
    return _rows(x_RD, copies.row_C)


@jax.custom_vjp
def collect(y_CD, copies: Copies):
    """The sum of each row's copies, in order of choice, float32 [R, D]."""
    total: Any = 0
    for i in range(copies.slot_Rk.shape[1]):
        total = total + _slots(y_CD, copies.slot_Rk[:, i]).astype(jnp.float32)
    return total


def _spread_forward(x_RD, copies: Copies):
    return spread(x_RD, copies), copies


def _spread_backward(copies: Copies, g_CD):
    return collect(g_CD, copies).astype(g_CD.dtype), None


def _collect_forward(y_CD, copies: Copies):
    return collect(y_CD, copies), (copies, jnp.zeros(0, y_CD.dtype))


def _collect_backward(saved, g_RD):
    copies, like_y = saved
    return spread(g_RD.astype(like_y.dtype), copies), None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def of_choices(weight_Rk, copies: Copies):
    """Each copy's own number, [C]."""
    return _rows(weight_Rk.reshape(-1), copies.copy_C)


def _of_choices_forward(weight_Rk, copies: Copies):
    return of_choices(weight_Rk, copies), copies


def _of_choices_backward(copies: Copies, g_C):
    return _slots(g_C, copies.slot_Rk), None


of_choices.defvjp(_of_choices_forward, _of_choices_backward)


def _rows(x_RD, row):
    return jnp.asarray(x_RD).at[row].get(mode="promise_in_bounds")


def _slots(y_CD, slot):
    """What stands there, zero where a copy is not among these."""
    present = (slot >= 0) & (slot < y_CD.shape[0])
    y = _rows(y_CD, jnp.where(present, slot, 0))
    return jnp.where(present.reshape(*present.shape, *(1,) * (y.ndim - present.ndim)), y, 0)


def in_rounds(fn: Callable, size: int, copies: Copies, *args):
    """The sum of `fn(part, *args)` over as many parts of `size` copies as hold one that is of a group, at least one.

    `args` are trees of floating-point arrays, to which gradients go. Memory is that of one part: the first is
    differentiated as any function, what it keeps being left to the remat policy; further ones, for which a router must
    favour this device's experts, are computed anew in the backward pass.
    """
    if size >= copies.copy_C.shape[0]:
        return fn(copies, *args)
    return _in_rounds(fn, size, copies, *args)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(fn, size, copies, *args):
    return _further(fn, size, copies, args, fn(copies.part(0, size), *args))


def _in_rounds_forward(fn, size, copies, *args):
    total, pull_back = jax.vjp(partial(fn, copies.part(0, size)), *args)
    return _further(fn, size, copies, args, total), (pull_back, copies, args)


def _further(fn, size, copies, args, total):
    def add(i, total):
        return total + fn(copies.part(i * size, size), *args)

    return lax.fori_loop(1, _rounds(copies, size), add, total)


def _in_rounds_backward(fn, size, saved, g):
    pull_back, copies, args = saved

    def add(i, gradients):
        _, pull_back = jax.vjp(partial(fn, copies.part(i * size, size)), *args)
        return jax.tree.map(jnp.add, gradients, pull_back(g))

    return None, *lax.fori_loop(1, _rounds(copies, size), add, pull_back(g))


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _rounds(copies: Copies, size: int):
    return jnp.maximum(1, -(-copies.ends_E[-1] // size))
