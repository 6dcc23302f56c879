"""The collectives a per-device program may use, each a no-op where its mesh axes do not exist.

The only importer of `jax.lax` collectives: model code says `ax.psum(x, BATCH)` and runs unchanged on one device.

A value inside the map *varies* over a mesh axis when devices along it may hold different ones, and is typed so; what
does not vary may leave the map as one value. Gradients follow from the types: a gather is differentiated into a
reduce-scatter, and a replicated weight that meets a varying activation gets a gradient summed over that axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
TRAINED = FSDP + EXPERT
"""In training, parameters that are no expert's are spread over `expert` as well: their state is a large part of what a
device would otherwise hold, and their gradients leave scattered. Generation would have to gather them for each token.
"""
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
    balanced: bool = False
    """Whether those along `context` are in balanced order (sharding/order.py)."""
    chip: str = ""
    """The kind of device, as JAX names it, for the choice of kernels; "" where any device must do."""
    reduce_dtype: str = ""
    """What gradients of weights are summed in over devices; "" for what is computed in."""
    spread_over: tuple[str, ...] = FSDP
    """Axes over which parameters are spread, to be gathered where they are used; TRAINED in training."""

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh | None) -> Axes:
        """Without a mesh: the default device."""
        if mesh is None:
            return cls(chip=jax.devices()[0].device_kind)
        return cls(tuple(mesh.shape.items()), chip=mesh.devices.flat[0].device_kind)

    @property
    def on_tpu(self) -> bool:
        return self.chip.startswith("TPU")

    @property
    def has_pallas(self) -> bool:
        """Whether kernels of Pallas run there in bfloat16: on TPU v4 and later."""
        return self.on_tpu and self.chip not in ("TPU v2", "TPU v3")

    def splitting(self, tokens: Sequence[str]) -> Axes:
        """The same mesh, with the tokens of a row split over those of `tokens` that it has."""
        return dataclasses.replace(self, tokens=self.live(tokens))

    def in_balance(self) -> Axes:
        """The same mesh, with the tokens of a row in balanced order."""
        return dataclasses.replace(self, balanced=True)

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

    def gather(self, x, names: Sequence[str], dim: int, dtype: Any = None) -> Any:
        """Concatenate the devices' pieces of dimension `dim`; every device gets a copy of its own. The pieces travel in
        `dtype`, where one is given, and the gradient in x's."""
        dtype = x.dtype if dtype is None else dtype
        return _gather(axes, dim, jnp.dtype(dtype), x) if (axes := self.live(names)) else x.astype(dtype)

    def gather_same(self, x, names: Sequence[str], dim: int):
        """`gather`, typed as one value that all devices along `names` share."""
        return lax.all_gather(x, axes, axis=dim, tiled=True, to="invarying") if (axes := self.live(names)) else x

    def scatter(self, x, names: Sequence[str], dim: int):
        """Sum over the devices along `names`, each keeping its piece of dimension `dim`."""
        return _scatter(self.live(names), dim, x)

    def ring_sum(self, share: Callable, name: str, step: int = 1):
        """Sum over the devices along the one axis `name` of what each has for this one: `share(i)` is what it has for
        device i, made while the sums travel, `step` devices at a time, rounded to its dtype at every stop.

        What `scatter` gives, where no collective must wait for the last share: XLA for TPU covers these hops with
        whatever else is to be computed.
        """
        n, me = self.size((name,)), self.index((name,))
        total = share((me - step) % n)
        for hop in range(2, n + 1):
            here = lax.ppermute(total, name, [(i, (i + step) % n) for i in range(n)]).astype(jnp.float32)
            total = (here + share((me - step * hop) % n).astype(jnp.float32)).astype(total.dtype)
        return total

    def piece(self, x, names: Sequence[str], dim: int):
        """This device's piece of dimension `dim` of what all devices along `names` hold."""
        if not (axes := self.live(names)):
            return x
        size = x.shape[dim] // self.size(axes)
        return lax.dynamic_slice_in_dim(self.vary(x, axes), self.index(axes) * size, size, dim)

    def permute(self, x, names: Sequence[str], pairs: Sequence[tuple[int, int]]):
        """Send to one device along `names` and receive from one: `pairs` of (from, to) cover each device once a side.
        """
        return lax.ppermute(x, axes, pairs) if (axes := self.live(names)) else x

    def exchange(self, tree, counts_nn, names: Sequence[str], rows: int, most: int):
        """Send rows to the devices along the one axis of `names`: counts_nn[s, d] of them from device s to device d.

        Arrays [A, …] hold the rows for each device, in the order of devices, from the first row on; what comes,
        [rows, …], lies in the order of senders likewise, anything behind it, and must fit. No device sends another more
        than `most`. The way back is `exchange` of `counts_nn.T`, and the gradient's way. Where the mesh has not got the
        axis, there is one device.
        """
        if not (axes := self.live(names)):
            sent = jnp.arange(rows, dtype=jnp.int32) < counts_nn[0, 0]
            return jax.tree.map(lambda x: jnp.where(_column(sent, x), _resized(x, rows), 0), tree)
        (axis,) = axes
        return jax.tree.map(lambda x: _exchange(axis, rows, most, x, counts_nn), tree)

    def varying(self, x) -> tuple[str, ...]:
        """Axes over which the devices may hold different values of the array `x`."""
        return _varying(x) if self.sizes else ()

    def vary(self, x, names: Sequence[str]):
        """Mark a replicated tree as this device's own copy; its gradient is then summed over `names`, once, here."""
        if not (axes := self.live(names)):
            return x
        return jax.tree.map(lambda leaf: _vary(leaf, axes), x)

    def vary_like(self, x, like):
        """Mark a tree as varying wherever the array `like` does: the start of a loop that will mix the two."""
        return self.vary(x, self.varying(like))


ONE_DEVICE = Axes()


def _varying(x) -> tuple[str, ...]:
    return tuple(jax.typeof(x).manual_axis_type.varying)


def _vary(leaf, axes: tuple[str, ...]):
    missing = tuple(a for a in axes if a not in _varying(leaf))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf


def _gather(axes: tuple[str, ...], dim: int, dtype: Any, x) -> Any:
    # At once: over one axis after the other, a dimension of the torus would idle while the next one works.
    if (len(axes) == 1 and x.dtype == dtype) or not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.all_gather(x, axes, axis=dim, tiled=True)
    return _gather_at_once(axes, dim, dtype, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather_at_once(axes: tuple[str, ...], dim: int, dtype, x):
    return lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _gather_at_once_forward(axes: tuple[str, ...], dim: int, dtype, x):
    return _gather_at_once(axes, dim, dtype, x), jnp.zeros(0, x.dtype)


def _gather_at_once_backward(axes: tuple[str, ...], dim: int, dtype, like_x, g):
    return (_scatter(axes, dim, g.astype(like_x.dtype)),)


_gather_at_once.defvjp(_gather_at_once_forward, _gather_at_once_backward)


def _scatter(axes: tuple[str, ...], dim: int, x):
    # One by one: XLA for TPU makes a sum of the whole out of a scatter over several axes.
    for name in axes:
        x = lax.psum_scatter(x, name, scatter_dimension=dim, tiled=True)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(axis: str, rows: int, most: int, x, counts_nn):
    return lax.platform_dependent(x, counts_nn, tpu=partial(_exchange_ragged, axis, rows),
                                  default=partial(_exchange_padded, axis, rows, most))


def _exchange_forward(axis: str, rows: int, most: int, x, counts_nn):
    return _exchange(axis, rows, most, x, counts_nn), (counts_nn, jnp.zeros((x.shape[0], 0)))


def _exchange_backward(axis: str, rows: int, most: int, saved, g):
    counts_nn, like_x = saved
    return _exchange(axis, like_x.shape[0], most, g, counts_nn.T), None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _exchange_ragged(axis: str, rows: int, x, counts_nn):
    me, starts_nn = lax.axis_index(axis), jnp.cumsum(counts_nn, 0) - counts_nn
    sent_n, come_n = counts_nn[me], counts_nn[:, me]
    out = _vary(lax.empty((rows, *x.shape[1:]), x.dtype), _varying(x))
    return lax.ragged_all_to_all(x, out, jnp.cumsum(sent_n) - sent_n, sent_n, starts_nn[me], come_n, axis_name=axis)


def _exchange_padded(axis: str, rows: int, most: int, x, counts_nn):
    """As many rows travel to each device as could be meant for it at most."""
    me = lax.axis_index(axis)
    sent_n, come_n = counts_nn[me], counts_nn[:, me]
    place_m = jnp.arange(most, dtype=jnp.int32)
    source_nm = (jnp.cumsum(sent_n) - sent_n)[:, None] + place_m[None]
    padded = lax.all_to_all(x.at[source_nm].get(mode="fill", fill_value=0), axis, 0, 0)
    target_nm = (jnp.cumsum(come_n) - come_n)[:, None] + place_m[None]
    target_nm = jnp.where(place_m[None] < come_n[:, None], target_nm, rows)
    out = _vary(jnp.zeros((rows, *x.shape[1:]), x.dtype), _varying(x))
    return out.at[target_nm].set(padded, mode="drop")


def _resized(x, rows: int):
    return jnp.pad(x[:rows], ((0, max(0, rows - x.shape[0])), *((0, 0),) * (x.ndim - 1)))


def _column(mask_R, x):
    return mask_R.reshape(-1, *(1,) * (x.ndim - 1))
