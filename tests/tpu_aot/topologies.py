"""The devices of a TPU topology on a machine without one, to compile for."""

from __future__ import annotations

import os
from typing import Any

from jax.experimental import topologies


def tpu_devices(name: str) -> list[Any]:
    """Devices of a topology such as "v5e:4x4"."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
