"""The collectives a per-device program may use, each a no-op when its mesh axis does not exist.

The only importer of `jax.lax` collectives: model code says `ax.psum(x, BATCH)` and runs unchanged on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax

BATCH = ("data",)
"""Mesh axes that split the batch."""


@dataclass(frozen=True)
class Axes:
    """Names and sizes of the mesh axes in scope; empty means one device."""

    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh | None) -> Axes:
        return cls() if mesh is None else cls(tuple(mesh.shape.items()))

    def size(self, name: str) -> int:
        return dict(self.sizes).get(name, 1)

    def live(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n in dict(self.sizes))

    def psum(self, x, names: Sequence[str]):
        """Sum over the devices along `names`; the result is the same on each of them."""
        return lax.psum(x, axes) if (axes := self.live(names)) else x

    def vary(self, x, names: Sequence[str]):
        """Mark a replicated tree as this device's own copy; its gradient is then summed over `names`, once, here."""
        if not (axes := self.live(names)):
            return x
        return jax.tree.map(lambda leaf: _vary(leaf, axes), x)

    def index(self, name: str):
        return lax.axis_index(name) if self.live((name,)) else 0


ONE_DEVICE = Axes()


def _vary(leaf, axes: tuple[str, ...]):
    missing = tuple(a for a in axes if a not in jax.typeof(leaf).manual_axis_type.varying)
    return lax.pcast(leaf, missing, to="varying") if missing else leaf
