"""Which tokens a device holds: a permutation, the same work for all, and the arrays that move agree with the slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.mesh import TOKENS_SPEC, make_mesh, per_device
from qwen2_jax.sharding.order import RowOrder, balance, row_slots


@given(st.integers(1, 8), st.integers(1, 5))
def test_balanced_devices_have_equal_work(size: int, half: int):
    slots = RowOrder.slots_of(2 * size * half, 2 * size)
    assert sorted(slots) == list(range(2 * size * half))
    assert len(set(slots.reshape(size, -1).sum(1))) == 1, "keys before all of a device's tokens together"


@pytest.mark.parametrize("context", [2, 4, 8])
def test_arrays_lie_as_the_slots_say(context: int):
    mesh, tokens = make_mesh(f"context={context}"), 16 * context
    row_BT = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))

    def local(x_bt, *, ax: Axes):
        balanced, (x_bt,) = balance(ax, (x_bt,))
        return x_bt, jnp.broadcast_to(row_slots(balanced, x_bt.shape[1]), x_bt.shape)

    held, slots = jax.jit(per_device(local, mesh, TOKENS_SPEC, TOKENS_SPEC))(row_BT)
    expected = np.broadcast_to(RowOrder.slots_of(tokens, 2 * context), (2, tokens))
    np.testing.assert_array_equal(held, expected)
    np.testing.assert_array_equal(slots, expected)
    order = RowOrder(context, 0, 2 * context)
    np.testing.assert_array_equal(order.in_order(held[..., None])[..., 0], row_BT)


def test_an_odd_row_stays_in_order():
    mesh = make_mesh("context=2")

    def local(x_bt, *, ax: Axes):
        after, same = balance(ax, x_bt)
        assert not after.balanced
        return same + row_slots(after, x_bt.shape[1])[None]

    x_BT = jnp.zeros((1, 6), jnp.int32)
    np.testing.assert_array_equal(jax.jit(per_device(local, mesh, TOKENS_SPEC, TOKENS_SPEC))(x_BT)[0], np.arange(6))
