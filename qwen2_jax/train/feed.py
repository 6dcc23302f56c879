"""Batches from the hosts to the devices: each process makes the rows that its own devices hold, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import BATCH, Axes
from qwen2_jax.sharding.mesh import TOKENS_SPEC, place, shardings


def own_rows(mesh: Mesh | None, batch_size: int) -> slice:
    """The rows of a batch that this process's devices hold. Raises UserError where rows cannot be split."""
    parts = Axes.of(mesh).size(BATCH)
    if batch_size % parts:
        raise UserError(f"data.batch_size {batch_size} cannot be split over {parts} devices along data, fsdp and "
                        f"expert of mesh '{_text(mesh)}': take a multiple of {parts}, or another mesh")
    if mesh is None or not mesh.is_multi_process:
        return slice(0, batch_size)
    where = shardings(TOKENS_SPEC, mesh).addressable_devices_indices_map((batch_size, mesh.size))
    rows = [index[0].indices(batch_size) for index in where.values()]
    return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))


def on_devices(batches: Iterable[PackedBatch], mesh: Mesh | None, batch_size: int) -> Iterator[PackedBatch]:
    """Global batches, each from this process's rows of it (`own_rows`)."""
    if mesh is None or not mesh.is_multi_process:
        for batch in batches:
            yield place(batch, mesh, TOKENS_SPEC)
        return
    where: Any = shardings(TOKENS_SPEC, mesh)
    first = own_rows(mesh, batch_size).start

    def whole(mine: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return mine[start - first:stop - first, index[1]]

        return jax.make_array_from_callback((batch_size, mine.shape[1]), where, piece)

    for batch in batches:
        yield jax.tree.map(whole, batch)


def _text(mesh: Mesh | None) -> str:
    return "" if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items())
