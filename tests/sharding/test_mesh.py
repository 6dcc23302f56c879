"""Meshes: what they are made from, what is refused, and that a mistake in a collective is a type error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import BATCH, CONTEXT, FSDP, TENSOR, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, TOKENS_SPEC, make_mesh, per_device, place, spread, torus


def test_make_mesh():
    assert make_mesh(None) is None and make_mesh("") is None
    mesh = make_mesh(" data=4 ")
    assert dict(mesh.shape) == {"data": 4} and make_mesh(mesh) is mesh


@pytest.mark.parametrize("spec, shape", [
    ("tensor=2,fsdp=2x2", {"fsdp_x": 2, "fsdp_y": 2, "tensor": 2}),     # in the one order, however it is written
    ("context=2, expert=2 ,data=2", {"data": 2, "expert": 2, "context": 2}),
    ("fsdp=8", {"fsdp_x": 8}),
    ("fsdp=1x4", {"fsdp_y": 4}),
    ("data=1,tensor=4", {"tensor": 4}),     # an axis of one device costs nothing: it is not there
    ("data=1", {"data": 1}),
])
def test_axes_in_their_order(spec, shape):
    mesh = make_mesh(spec)
    assert list(mesh.shape.items()) == list(shape.items())
    assert [d.id for d in mesh.devices.flat] == list(range(mesh.size))


def test_a_mesh_of_the_callers():
    """Axes of one device are left out, the others brought into order, each device keeping its place."""
    devices = np.array(jax.devices()).reshape(2, 1, 4)
    mesh = make_mesh(jax.sharding.Mesh(devices, ("tensor", "data", "fsdp_x")))
    assert list(mesh.shape.items()) == [("fsdp_x", 4), ("tensor", 2)]
    assert (mesh.devices == devices[:, 0].T).all()
    with pytest.raises(UserError, match="mesh axis 'model'"):
        make_mesh(jax.sharding.Mesh(devices, ("model", "data", "fsdp_x")))


class Chip:
    def __init__(self, *coords, core=0):
        self.coords, self.core_on_chip = coords, core


def test_the_torus_of_devices():
    chips = [Chip(x, y, 0) for x in range(4) for y in range(2)]
    assert torus(chips) == (4, 2)
    assert torus([Chip(x, y, 0, core=c) for x in range(2) for y in range(2) for c in range(2)]) == (2, 2, 2)
    assert torus(chips[:3]) == (3,)      # with gaps
    assert torus(jax.devices()) == (8,) and torus(jax.devices()[:1]) == (1,)


@pytest.mark.parametrize("size, dimensions, factors", [
    (16, (4, 4), (4, 4)), (256, (16, 16), (16, 16)), (64, (4, 4, 4), (4, 4, 4)), (4, (4, 4), (4,)),
    (16, (4, 4, 4), (4, 4)), (8, (4, 4), (2, 4)), (8, (8,), (8,)), (6, (4, 4), (6,)), (2, (2, 2, 2), (2,)),
    (1, (4, 4), (1,)),
])
def test_fsdp_spread_over_a_torus(size, dimensions, factors):
    assert spread(size, dimensions) == factors


class TorusChip(Chip):
    platform, process_index, slice_index = "tpu", 0, 0

    def __init__(self, number, kind, *coords, core=0):
        super().__init__(*coords, core=core)
        self.id, self.device_kind = number, kind


TORI = {"v2 2x2": ("TPU v2", (2, 2, 1), 2), "v4 2x2x2": ("TPU v4", (2, 2, 2), 1),
        "v5e 2x2": ("TPU v5 lite", (2, 2, 1), 1), "v5e 4x4": ("TPU v5 lite", (4, 4, 1), 1),
        "v5e 16x16": ("TPU v5 lite", (16, 16, 1), 1),
        "v5p 4x4x4": ("TPU v5", (4, 4, 4), 1), "tpu7x 2x2x2": ("TPU7x", (2, 2, 2), 2)}


def torus_chips(kind, dimensions, cores):
    """In JAX's order: host by host, each a square of 2x2 chips, x first."""
    X, Y, Z = dimensions
    places = ((x + i, y + j, z, c) for z in range(Z) for y in range(0, Y, 2) for x in range(0, X, 2)
              for j in range(2) for i in range(2) for c in range(cores))
    return [TorusChip(n, kind, x, y, z, core=c) for n, (x, y, z, c) in enumerate(places)]


@pytest.mark.parametrize("name", TORI)
def test_a_mesh_smaller_than_the_machine_takes_its_first_devices(name):
    """Of any size, whether they fill a box of the torus (which JAX's own layout insists on) or not."""
    chips = torus_chips(*TORI[name])
    for size in range(1, min(len(chips), 40) + 1):
        specs = [f"fsdp={size}", f"tensor={size}"]
        specs += [f"expert={a},fsdp={b},context={c}" for a in (1, 2, 3) for b in (2, 5, 7) for c in (1, 2, 3)
                  if a * b * c == size]
        for spec in specs:
            mesh = make_mesh(spec, chips)
            assert sorted(d.id for d in mesh.devices.flat) == list(range(size)), spec
    assert [d.id for d in make_mesh("data=3", chips).devices] == [0, 1, 2]


def test_a_mesh_that_fills_the_torus_still_lies_along_it():
    """Neighbours along each axis are neighbours in the torus."""
    mesh = make_mesh("fsdp=4x4", torus_chips(*TORI["v5e 4x4"]))
    places = np.array([[d.coords[:2] for d in row] for row in mesh.devices])
    for axis in (0, 1):
        assert (np.abs(np.diff(places, axis=axis)).sum(-1) == 1).all()


class SliceChip(Chip):
    """Of a slice of 2x2 chips."""
    platform, device_kind, process_index = "tpu", "a chip", 0

    def __init__(self, number):
        super().__init__(number % 4 // 2, number % 2, 0)
        self.id, self.slice_index = number, number // 4


def test_only_data_goes_across_slices():
    chips = [SliceChip(n) for n in range(8)]
    for spec, shape in (("data=2,fsdp=4", {"data": 2, "fsdp_x": 2, "fsdp_y": 2}), ("data=8", {"data": 8}),
                        ("tensor=2,data=4", {"data": 4, "tensor": 2})):
        mesh = make_mesh(spec, chips)
        assert dict(mesh.shape) == shape
        by_slice = mesh.devices.reshape(2, 4)
        assert [{d.slice_index for d in row} for row in by_slice] == [{0}, {1}]
    assert {d.slice_index for d in make_mesh("fsdp=2,tensor=2", chips).devices.flat} == {0}
    for spec, taken in (("fsdp=8", "4 and 4"), ("tensor=2,fsdp=4", "4 and 4"), ("data=3,tensor=2", "4 and 2")):
        with pytest.raises(UserError, match=f"lies on 2 slices, of which it takes {taken} devices: data must be a mul"):
            make_mesh(spec, chips)


def test_no_process_is_left_out(monkeypatch):
    chips = [SliceChip(n) for n in range(4)]
    for chip in chips[2:]:
        chip.process_index = 1
    assert make_mesh("data=2", chips).size == 2     # devices that somebody names, to compile for
    monkeypatch.setattr(jax, "devices", lambda: chips)
    assert make_mesh("data=2,tensor=2").size == 4
    with pytest.raises(UserError, match="mesh 'data=2' takes 2 of 4 devices, and none of process 1: start fewer"):
        make_mesh("data=2")


@pytest.mark.parametrize("spec, message", [
    ("model=2", "mesh axis 'model' in 'model=2' is not supported: data, fsdp, expert, context, tensor are"),
    ("fsdp_x=2", "mesh axis 'fsdp_x'"),
    ("tensor=2x2", "mesh axis 'tensor' needs a positive whole number, found '2x2'"),
    ("fsdp=2x", "found '2x'"),
    ("fsdp=2x2x2x1", "at most 3 dimensions"),
    ("fsdp=2x2,tensor=4", "needs 16 devices, this machine has 8"),
    ("data", "needs a positive whole number, found ''"),
    ("data=0", "needs a positive whole number, found '0'"),
    ("data=²", "needs a positive whole number, found '²'"),
    ("data=-1", "found '-1'"),
    ("data=2,data=2", "appears twice"),
    (",", "mesh ',' names no axis: write one like data=4"),
    (" ", "mesh ' ' names no axis"),
    ("data=9", "needs 9 devices, this machine has 8"),
    ("data=" + 5000 * "9", "needs a positive whole number, found '99999999999999999999' in 'data=9{75}'$"),
])
def test_what_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_mesh(spec)


def test_axes_are_nothing_on_one_device():
    ax = Axes.of(None)
    x = jnp.ones(3)
    assert ax.psum(x, BATCH) is x and ax.vary(x, BATCH) is x
    assert ax.size(BATCH) == 1 and ax.index(BATCH) == 0 and ax.live(BATCH) == ()
    for same in (ax.pmax(x, TENSOR), ax.gather(x, FSDP, 0), ax.gather_same(x, TENSOR, 0), ax.scatter(x, TENSOR, 0),
                 ax.piece(x, CONTEXT, 0), ax.vary_like(x, x)):
        assert same is x


def test_collectives_on_a_mesh():
    mesh = make_mesh("data=4")

    def local(x, *, ax):
        assert ax.size(BATCH) == 4 and x.shape == (2,)
        again = ax.vary(ax.vary(x, BATCH), BATCH)      # already this device's own: nothing to mark
        return ax.psum(x.sum(), BATCH), again + jnp.float32(ax.index(BATCH))

    mapped = per_device(local, mesh, BATCH_SPEC, (REPLICATED, BATCH_SPEC))
    total, moved = mapped(place(jnp.arange(8.0), mesh, BATCH_SPEC))
    assert total == 28
    np.testing.assert_array_equal(moved, np.arange(8) + np.repeat(np.arange(4), 2))


def test_pieces_and_gathers_undo_each_other():
    """Over two axes of one group: the first is the major one, in the specs and in every collective."""
    mesh = make_mesh("fsdp=2x2,tensor=2")
    spec = jax.sharding.PartitionSpec(FSDP[:2])

    def local(x, *, ax):
        assert x.shape == (2,)
        whole = ax.gather(x, FSDP, 0)
        summed = ax.scatter(whole, FSDP, 0)      # each of four devices has the same whole
        piece = ax.piece(ax.gather_same(x, FSDP, 0), FSDP, 0)
        return piece, summed, ax.gather_same(x, FSDP, 0), jnp.full(2, ax.index(FSDP)), ax.pmax(x.max(), FSDP)

    outs = (spec, spec, REPLICATED, spec, REPLICATED)
    x = jnp.arange(8.0)
    piece, summed, whole, index, top = per_device(local, mesh, spec, outs)(x)
    np.testing.assert_array_equal(piece, x)
    np.testing.assert_array_equal(summed, 4 * x)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(index, np.repeat(np.arange(4), 2))
    assert top == 7


def test_specs_name_axes_that_a_mesh_has_not_got():
    mesh = make_mesh("tensor=2")
    x = place(np.arange(12.0).reshape(4, 3), mesh, TOKENS_SPEC)
    assert x.sharding.is_fully_replicated
    assert per_device(lambda x, ax: x * 2, mesh, TOKENS_SPEC, TOKENS_SPEC)(x).shape == (4, 3)


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
