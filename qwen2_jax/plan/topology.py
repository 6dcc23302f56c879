"""From what a TPU slice is called to its devices: `v5p:2x2x4`, or a slice's name such as `v5p-32`.

The number in a name counts cores on v2, v3, v4, v5p and tpu7x, and chips on v5e and v6e.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen2_jax.errors import UserError
from qwen2_jax.plan.chips import CALIBRATED_LIBTPU, CHIPS, Chip

SLICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v2": ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)),
    "v3": ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
    "v4": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16)),
    "v5e": ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    "v5p": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16)),
    "v6e": ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    "tpu7x": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}
"""Generation → chips along each dimension of the slices that Google Cloud offers, smallest first."""
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x"}
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
    # Any will do: otherwise libtpu looks for the machine's own, and complains on stderr of what it does not find.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment in which libtpu compiles on a machine without a TPU."""
LONGEST = 40
"""Letters of what was written that a message repeats."""


@dataclass(frozen=True)
class Topology:
    """Chips of one generation in a grid."""

    chip: Chip
    dimensions: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dimensions))}"

    @property
    def chips(self) -> int:
        return math.prod(self.dimensions)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def slice_name(self) -> str | None:
        """The name of this slice at Google Cloud; None where none has these dimensions."""
        offered = self.dimensions in SLICES[self.chip.name]
        return f"{self.chip.name}-{self.chips * (self.chip.named_by_cores or 1)}" if offered else None


def slices() -> Iterator[Topology]:
    """All that have a name."""
    for generation, grids in SLICES.items():
        for dimensions in grids:
            yield Topology(CHIPS[generation], dimensions)


def parse_topology(text: str) -> Topology:
    """`v5p:2x2x4` or `v5p-32`. Raises UserError that says what there is."""
    word, text = text.strip().lower(), text[:LONGEST]
    generation, colon, grid = word.partition(":")
    generation = ALIASES.get(generation, generation)
    if colon:
        if generation in CHIPS and re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", grid):
            return _of_shape(CHIPS[generation], tuple(map(int, grid.split("x"))), text)
    else:
        generation, _, number = word.rpartition("-")
        generation = ALIASES.get(generation, generation)
        if generation in CHIPS and re.fullmatch(r"[1-9][0-9]{0,8}", number):
            return _named(CHIPS[generation], number, text)
    known = [name for t in slices() for name in (str(t), str(t.slice_name))]
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}" if near else f"generations are {', '.join(CHIPS)}"
    raise UserError(f"topology '{text}' is neither like v5p:2x2x4 nor a slice's name like v5p-32; {hint}")


def _of_shape(chip: Chip, dimensions: tuple[int, ...], text: str) -> Topology:
    if len(dimensions) != chip.dimensions:
        example = "x".join(map(str, SLICES[chip.name][2]))
        raise UserError(f"topology '{text}' has {len(dimensions)} dimensions; {chip.name} has {chip.dimensions}, as in "
                        f"{chip.name}:{example}")
    topology = Topology(chip, dimensions)
    # Asked for more than there is, libtpu compiles for many minutes, or aborts the whole process.
    if topology.chips > chip.most_chips or max(dimensions) > chip.longest:
        along = f", {chip.longest} along a dimension" if chip.longest < chip.most_chips else ""
        raise UserError(f"topology '{text}' is larger than {chip.name} has: a slice is of at most "
                        f"{chip.most_chips:,} chips{along}")
    return topology


def _named(chip: Chip, number: str, text: str) -> Topology:
    offered = {t.slice_name: t for t in slices() if t.chip is chip}
    if (found := offered.get(f"{chip.name}-{number}")) is not None:
        return found
    counts = "cores" if chip.named_by_cores else "chips"
    raise UserError(f"slice '{text}' does not exist (the number counts {counts}); of {chip.name} there are "
                    f"{', '.join(map(str, offered))}")


def libtpu_version() -> str | None:
    """Version of the installed compiler; None where there is none."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_calibrated(version: str) -> bool:
    return version == CALIBRATED_LIBTPU or version.startswith(f"{CALIBRATED_LIBTPU}.")


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a topology to compile for; no TPU is needed, nor touched where there is one.

    Raises UserError: libtpu is not installed, or knows no such topology.
    """
    if libtpu_version() is None:
        raise UserError('compiling for TPUs needs libtpu, which is not installed: pip install "qwen2_jax[tpu]"')
    for name, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **_settings(topology))
    except Exception as error:      # of several types, as libtpu is told apart from its C interface
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"libtpu {libtpu_version()} refuses the topology '{topology}': {reason}; known ones are "
                        f"{', '.join(str(t) for t in slices() if t.chip is topology.chip)}") from error
    return list(found.devices)


def _settings(topology: Topology) -> dict[str, Any]:
    """What libtpu must be told beside the name."""
    settings: dict[str, Any] = {}
    if topology.chips == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)       # otherwise a host has four
    if topology.chip.name == "v4":
        settings["chip_config_name"] = "megacore"           # both cores as one device, as Cloud TPU machines are set up
    return settings
