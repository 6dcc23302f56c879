"""Meshes: what they are made from, what is refused, and that a mistake in a collective is a type error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import BATCH, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, make_mesh, per_device, place


def test_make_mesh():
    assert make_mesh(None) is None and make_mesh("") is None
    mesh = make_mesh(" data=4 ")
    assert dict(mesh.shape) == {"data": 4} and make_mesh(mesh) is mesh


@pytest.mark.parametrize("spec, message", [
    ("tensor=2", "mesh axis 'tensor' in 'tensor=2' is not supported"),
    ("data", "needs a positive whole number, found ''"),
    ("data=0", "needs a positive whole number, found '0'"),
    ("data=²", "needs a positive whole number, found '²'"),
    ("data=-1", "found '-1'"),
    ("data=2,data=2", "appears twice"),
    ("data=9", "needs 9 devices, this machine has 8"),
])
def test_what_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_mesh(spec)


def test_axes_are_nothing_on_one_device():
    ax = Axes.of(None)
    x = jnp.ones(3)
    assert ax.psum(x, BATCH) is x and ax.vary(x, BATCH) is x
    assert ax.size("data") == 1 and ax.index("data") == 0 and ax.live(BATCH) == ()


def test_collectives_on_a_mesh():
    mesh = make_mesh("data=4")

    def local(x, *, ax):
        assert ax.size("data") == 4 and x.shape == (2,)
        again = ax.vary(ax.vary(x, BATCH), BATCH)      # already this device's own: nothing to mark
        return ax.psum(x.sum(), BATCH), again + jnp.float32(ax.index("data"))

    mapped = per_device(local, mesh, BATCH_SPEC, (REPLICATED, BATCH_SPEC))
    total, moved = mapped(place(jnp.arange(8.0), mesh, BATCH_SPEC))
    assert total == 28
    np.testing.assert_array_equal(moved, np.arange(8) + np.repeat(np.arange(4), 2))


def test_gradient_of_a_replicated_weight_is_the_sum_over_devices():
    mesh = make_mesh("data=4")
    x = jnp.arange(8.0)

    def local(w, x, *, ax):
        return ax.psum(jnp.sum(ax.vary(w, BATCH) * x), BATCH)

    assert jax.grad(per_device(local, mesh, (REPLICATED, BATCH_SPEC), REPLICATED))(jnp.float32(2), x) == 28


def test_a_forgotten_sum_is_refused():
    """The variance check is on: what differs between devices cannot leave as if it did not."""
    def forgetful(x, *, ax):
        return x.sum()

    with pytest.raises(ValueError, match="data"):
        per_device(forgetful, make_mesh("data=4"), BATCH_SPEC, REPLICATED)(jnp.arange(8.0))


def test_place():
    mesh = make_mesh("data=2")
    spread = place({"x": np.arange(4)}, mesh, BATCH_SPEC)["x"]
    assert [s.data.tolist() for s in spread.addressable_shards] == [[0, 1], [2, 3]]
    assert isinstance(place({"x": np.arange(4)}, None)["x"], jax.Array)
