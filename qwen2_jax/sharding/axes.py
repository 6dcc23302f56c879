"""The collectives a per-device program may use, each a no-op where its mesh axes do not exist.

The only importer of `jax.lax` collectives: model code says `ax.psum(x, BATCH)` and runs unchanged on one device.

A value inside the map *varies* over a mesh axis when devices along it may hold different ones, and is typed so; what
does not vary may leave the map as one value. Gradients follow from the types: a gather is differentiated into a
reduce-scatter, and a replicated weight that meets a varying activation gets a gradient summed over that axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax

FSDP = ("fsdp_x", "fsdp_y", "fsdp_z")
"""Parameters are spread over these and gathered where they are used: one mesh axis a dimension of the chips' torus,
so that gradients travel back as reduce-scatters (docs/architecture.md)."""
MESH_AXES = ("data", *FSDP, "expert", "context", "tensor")
"""Every axis a mesh may have, outermost first."""
BATCH = ("data", *FSDP, "expert")
"""Axes that split the batch: for all that is not an expert, `expert` is one more of them."""
CONTEXT = ("context",)
"""Splits the tokens of a row."""
TENSOR = ("tensor",)
"""Splits heads, feed-forward width and vocabulary; between blocks, the tokens of a row."""
EXPERT = ("expert",)
IN_STEP = FSDP + EXPERT
"""Batch axes whose devices exchange weights or tokens in each layer: they leave a loop together."""


@dataclass(frozen=True)
class Axes:
    """Names and sizes of the mesh axes in scope; empty means one device.

    `tokens`: those axes that split the tokens of a row between blocks, outermost first; none where a program takes a
    token at a time.
    """

    sizes: tuple[tuple[str, int], ...] = ()
    tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> Axes:
        return cls() if mesh is None else cls(tuple(mesh.shape.items()))

    def splitting(self, tokens: Sequence[str]) -> Axes:
        """The same mesh, with the tokens of a row split over those of `tokens` that it has."""
        return dataclasses.replace(self, tokens=self.live(tokens))

    def size(self, names: Sequence[str]) -> int:
        """Devices along `names`."""
        return math.prod(size for name, size in self.sizes if name in names)

    def live(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n in dict(self.sizes))

    def index(self, names: Sequence[str]):
        """This device's place along `names`, row-major, int32."""
        return lax.axis_index(axes) if (axes := self.live(names)) else 0

    def psum(self, x, names: Sequence[str]):
        """Sum over the devices along `names`; the result is the same on each of them."""
        return lax.psum(x, axes) if (axes := self.live(names)) else x

    def pmax(self, x, names: Sequence[str]):
        """Largest over the devices along `names`, the same on each of them. Has no gradient."""
        return lax.pmax(lax.stop_gradient(x), axes) if (axes := self.live(names)) else x

    def gather(self, x, names: Sequence[str], dim: int):
        """Concatenate the devices' pieces of dimension `dim`; every device gets a copy of its own."""
        for name in reversed(self.live(names)):
            x = lax.all_gather(x, name, axis=dim, tiled=True)
        return x

    def gather_same(self, x, names: Sequence[str], dim: int):
        """`gather`, typed as one value that all devices along `names` share."""
        for name in reversed(self.live(names)):
            x = lax.all_gather(x, name, axis=dim, tiled=True, to="invarying")
        return x

    def scatter(self, x, names: Sequence[str], dim: int):
        """Sum over the devices along `names`, each keeping its piece of dimension `dim`."""
        for name in self.live(names):
            x = lax.psum_scatter(x, name, scatter_dimension=dim, tiled=True)
        return x

    def piece(self, x, names: Sequence[str], dim: int):
        """This device's piece of dimension `dim` of what all devices along `names` hold."""
        if not (axes := self.live(names)):
            return x
        size = x.shape[dim] // self.size(axes)
        return lax.dynamic_slice_in_dim(self.vary(x, axes), self.index(axes) * size, size, dim)

    def vary(self, x, names: Sequence[str]):
        """Mark a replicated tree as this device's own copy; its gradient is then summed over `names`, once, here."""
        if not (axes := self.live(names)):
            return x
        return jax.tree.map(lambda leaf: _vary(leaf, axes), x)

    def vary_like(self, x, like):
        """Mark a tree as varying wherever the array `like` does: the start of a loop that will mix the two."""
        return self.vary(x, tuple(jax.typeof(like).manual_axis_type.varying)) if self.sizes else x


ONE_DEVICE = Axes()


def _vary(leaf, axes: tuple[str, ...]):
    missing = tuple(a for a in axes if a not in jax.typeof(leaf).manual_axis_type.varying)
    return lax.pcast(leaf, missing, to="varying") if missing else leaf
