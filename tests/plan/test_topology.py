"""Names of slices, and what they stand for."""

from __future__ import annotations

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.plan import topology
from qwen2_jax.plan.topology import is_calibrated, parse_topology, slices


@pytest.mark.parametrize(("name", "text", "chips", "devices"), [
    ("v2-8", "v2:2x2", 4, 8),
    ("v3-8", "v3:2x2", 4, 8),
    ("v3-32", "v3:4x4", 16, 32),
    ("v4-8", "v4:2x2x1", 4, 4),
    ("v5e-1", "v5e:1x1", 1, 1),
    ("v5e-8", "v5e:2x4", 8, 8),
    ("v5e-16", "v5e:4x4", 16, 16),
    ("v5e-256", "v5e:16x16", 256, 256),
    ("v5p-8", "v5p:2x2x1", 4, 4),
    ("v5p-32", "v5p:2x2x4", 16, 16),
    ("v5p-128", "v5p:4x4x4", 64, 64),
    ("v6e-8", "v6e:2x4", 8, 8),
    ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
])
def test_a_slice_and_its_topology_are_one(name, text, chips, devices):
    found = parse_topology(name)
    assert found == parse_topology(text) == parse_topology(f" {text.upper()} ")
    assert (str(found), found.slice_name, found.chips, found.devices) == (text, name, chips, devices)


def test_names_are_unique_and_lead_back():
    names = [t.slice_name for t in slices()]
    assert len(set(names)) == len(names)
    assert all(parse_topology(str(t.slice_name)) == t for t in slices())


def test_a_topology_without_a_name():
    assert parse_topology("v5e:2x1").slice_name is None


def test_cloud_names():
    assert parse_topology("v5litepod-16") == parse_topology("v5e-16")


@pytest.mark.parametrize(("text", "message"), [
    ("v5x-8", "did you mean v5p-8"),
    ("v5p-7", "number counts cores.*v5p-8, v5p-16"),
    ("v5e-3", "number counts chips.*v5e-1, v5e-4"),
    ("v5p:4x4", "2 dimensions; v5p has 3, as in v5p:2x2x4"),
    ("v5e:4x4x1", "3 dimensions; v5e has 2"),
    ("v5e:4xfour", "neither like"),
    ("v5e:0x4", "neither like"),
    ("v5e:1x4٤", "neither like"),
    ("v5p-١٦", "neither like"),
    ("v5p-032", "neither like"),
    ("v5e:" + 5000 * "9", "'v5e:9{36}' is neither like"),
    ("v5e-" + 5000 * "9", "'v5e-9{36}' is neither like"),
    ("v5e:18x18", "'v5e:18x18' is larger than v5e has: a slice is of at most 256 chips, 16 along a dimension$"),
    ("v5e:8x32", "larger than v5e has"),
    ("v6e:16x32", "larger than v6e has"),
    ("v3:64x16", "at most 1,024 chips, 32 along"),
    ("v4:16x16x20", "at most 4,096 chips$"),
    ("v5p:32x32x32", "at most 6,144 chips$"),
    ("tpu7x:32x32x32", "at most 9,216 chips$"),
    ("", "neither like.*generations are v2, v3"),
])
def test_refusals(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


@pytest.mark.parametrize("text", ["v2:16x16", "v3:32x32", "v4:12x12x24", "v4:16x16x16", "v5e:16x16", "v5p:16x16x24",
                                  "v6e:16x16", "tpu7x:4x4x576"])
def test_the_largest_there_are(text):
    assert str(parse_topology(text)) == text


def test_every_slice_that_is_offered_is_small_enough():
    assert all(parse_topology(str(t)) == t for t in slices())


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology, "libtpu_version", lambda: None)
    with pytest.raises(UserError, match=r'pip install "qwen2_jax\[tpu\]"'):
        topology.tpu_devices(parse_topology("v5e-1"))


@pytest.mark.parametrize(("version", "known"), [("0.0.42", True), ("0.0.42.1", True), ("0.0.420", False),
                                                ("0.0.52", False)])
def test_calibrated_versions(version, known):
    assert is_calibrated(version) == known
