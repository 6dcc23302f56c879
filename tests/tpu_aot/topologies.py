"""The devices of a TPU topology on a machine without one, to compile for."""

from __future__ import annotations

from typing import Any

from qwen2_jax.plan import topology


def tpu_devices(name: str) -> list[Any]:
    """Devices of a topology such as "v5e:4x4"."""
    return topology.tpu_devices(topology.parse_topology(name))
