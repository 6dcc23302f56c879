"""A round trip over each axis comes back exact, and a link that changes a number is seen."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen2_jax.sharding import health
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.health import default_mesh, device_facts, round_trips
from qwen2_jax.sharding.mesh import make_mesh


def test_each_axis():
    trips = round_trips(make_mesh("fsdp=2x2,tensor=2"), buffer_bytes=4096, repeats=2)
    assert [(t.axis, t.devices, t.buffer_bytes) for t in trips] == [
        ("fsdp_x", 2, 4096), ("fsdp_y", 2, 4096), ("tensor", 2, 4096)]
    for t in trips:
        assert t.exact and not t.crosses_slices
        assert t.gather_bandwidth == pytest.approx(2048 / t.gather_seconds)
        assert t.scatter_bandwidth == pytest.approx(2048 / t.scatter_seconds)
    [one] = round_trips(make_mesh("data=8"), buffer_bytes=100, repeats=1)
    assert one.exact and one.buffer_bytes == 4 * 8 * 3      # three whole numbers from each of eight devices
    assert round_trips(make_mesh("data=8"), buffer_bytes=1, repeats=1)[0].buffer_bytes == 4 * 8


def test_a_bad_link_is_seen(monkeypatch):
    honest = Axes.scatter

    def flipped(self, x, names, dim):
        return honest(self, x, names, dim).at[0].add(jax.numpy.where(self.index(("tensor",)) == 1, 1.0, 0.0))

    monkeypatch.setattr(Axes, "scatter", flipped)
    trips = round_trips(make_mesh("data=2,tensor=2"), buffer_bytes=64, repeats=1)
    assert not any(t.exact for t in trips)


def test_slices():
    class Device:
        platform = "tpu"

        def __init__(self, number):
            self.slice_index = number

    class Mesh:
        axis_names, shape = ("data", "tensor"), {"data": 2, "tensor": 2}
        devices = np.array([[Device(0), Device(0)], [Device(1), Device(1)]])

    assert health._crosses_slices(Mesh, "data") and not health._crosses_slices(Mesh, "tensor")     # pyright: ignore


def test_device_facts():
    facts = device_facts()
    assert (facts["backend"], facts["devices"], facts["processes"], facts["slices"], facts["torus"]) == (
        "cpu", 8, 1, 1, [8])
    assert [d["id"] for d in facts["local"]] == list(range(8))


def test_default_mesh():
    assert default_mesh(16, 1) == "fsdp=16" and default_mesh(32, 2) == "data=2,fsdp=16"
