"""One table of constants of TPU generations, with sources: what every second and every byte of a plan rests on.

All figures are of one JAX device: a core on v2 and v3, a chip on v4, v5e, v5p and v6e, half a chip on tpu7x. None was
measured here on a real chip.

Sources. Peak and HBM bandwidth: Google Cloud's page of each generation, v2's bandwidth by libtpu's cost model. Links:
"How to Scale Your Model" (Google DeepMind 2025, chapter "TPUs"), one way; v2 from Jouppi et al. 2020, "A
Domain-Specific Supercomputer for Training Deep Neural Networks" (496 Gbit/s); tpu7x from its page, 1200 GB/s both ways
over six links, and six times a link between the two halves of a chip; between the cores of v2 and v3, for which no
figure is published, their HBM's. Usable HBM: what libtpu 0.0.42 says when a program does not fit. Clock: the rate at
which `estimated_cycles` of libtpu 0.0.42 reproduce peak; calibrated means that a dense layer's products then come to
95 to 98 % of it. Largest slice: Google Cloud's page of each generation; a pod, but on v5p, whose pod has 8,960 chips,
the largest job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CALIBRATED_LIBTPU = "0.0.42"
"""The compiler version (its first three numbers) whose cycles were compared with peak."""
GIB = 2**30
KERNEL_EFFICIENCY = 0.6
"""Share of peak that a hand-written kernel is taken to reach where arithmetic bounds it."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation. Rates are a second and, unless they say otherwise, a JAX device."""

    name: str
    flops: float
    """bfloat16 products and sums."""
    hbm_bytes: int
    """What a program may use of a device's memory."""
    hbm_bandwidth: float
    link_bandwidth: float
    """Bytes a second that one link of a *chip* carries in one direction."""
    core_bandwidth: float = 0.0
    """Bytes a second in one direction between the devices of one chip."""
    clock: float
    """Cycles a second of the compiler's estimates."""
    calibrated: bool
    devices_per_chip: int = 1
    dimensions: int = 3
    """Of the torus of chips."""
    named_by_cores: int = 0
    """Cores a chip has where a slice's name counts cores; 0 where it counts chips."""
    wraps_at: int
    """A dimension of the torus closes into a ring where its size is a multiple of this; elsewhere it is a line."""
    whole_cubes: bool = False
    """Rings need every dimension of the slice to be a multiple of `wraps_at`."""
    most_chips: int
    """Of one slice."""

    @property
    def longest(self) -> int:
        """Most chips along one dimension: a flat pod is a square, others are joined from cubes in any shape."""
        return math.isqrt(self.most_chips) if self.dimensions == 2 else self.most_chips

    def wraps(self, size: int, dimensions: tuple[int, ...]) -> bool:
        """Whether a dimension of that many chips is a ring in a slice of these dimensions."""
        if self.whole_cubes and any(n % self.wraps_at for n in dimensions):
            return False
        return size > 2 and size % self.wraps_at == 0


CHIPS = {chip.name: chip for chip in (
    Chip(name="v2", flops=23e12, hbm_bytes=int(7.48 * GIB), hbm_bandwidth=350e9, link_bandwidth=62e9,
         core_bandwidth=350e9, clock=0.71e9, calibrated=False, devices_per_chip=2, dimensions=2, named_by_cores=2,
         wraps_at=16, most_chips=256),
    Chip(name="v3", flops=61.5e12, hbm_bytes=int(15.48 * GIB), hbm_bandwidth=450e9, link_bandwidth=100e9,
         core_bandwidth=450e9, clock=0.98e9, calibrated=False, devices_per_chip=2, dimensions=2, named_by_cores=2,
         wraps_at=32, most_chips=1024),
    Chip(name="v4", flops=275e12, hbm_bytes=int(30.75 * GIB), hbm_bandwidth=1200e9, link_bandwidth=45e9,
         clock=1.14e9, calibrated=False, named_by_cores=2, wraps_at=4, whole_cubes=True, most_chips=4096),
    Chip(name="v5e", flops=197e12, hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, link_bandwidth=45e9, clock=1.5e9,
         calibrated=True, dimensions=2, wraps_at=16, most_chips=256),
    Chip(name="v5p", flops=459e12, hbm_bytes=int(95.74 * GIB), hbm_bandwidth=2765e9, link_bandwidth=90e9,
         clock=1.75e9, calibrated=True, named_by_cores=2, wraps_at=4, whole_cubes=True, most_chips=6144),
    Chip(name="v6e", flops=918e12, hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1638e9, link_bandwidth=90e9,
         clock=1.75e9, calibrated=True, dimensions=2, wraps_at=16, most_chips=256),
    Chip(name="tpu7x", flops=1153.5e12, hbm_bytes=int(94.75 * GIB), hbm_bandwidth=3690e9, link_bandwidth=100e9,
         core_bandwidth=600e9, clock=2.31e9, calibrated=False, devices_per_chip=2, named_by_cores=2, wraps_at=4,
         whole_cubes=True, most_chips=9216),
)}

_KINDS = {"TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e",
          "TPU7x": "tpu7x"}


def chip_of(device_kind: str) -> Chip | None:
    """The generation of a device, by JAX's name for its kind; None for anything but a TPU known here."""
    return CHIPS.get(_KINDS.get(device_kind, ""))
