"""Weights from a checkpoint into JAX arrays, in the layout and on the devices that a program wants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax.checkpoint import names
from qwen2_jax.checkpoint.convert import DTYPES, DtypeName, check_choice
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import Reader, blocks
from qwen2_jax.checkpoint.source import Checkpoint, open_checkpoint
from qwen2_jax.checkpoint.tree import flat, nested
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.shapes import param_shapes

_ALIGN = 64  # XLA's CPU client takes over a numpy buffer without a copy when it is aligned so


def load_params(src: str | Path | Checkpoint, cfg: ModelConfig | None = None, *, dtype: DtypeName, stacked: bool,
                shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameter tree of a checkpoint as JAX arrays of `dtype` ("bfloat16", "float32" or "keep").

    Leaves are filled one after the other, so the host holds one leaf beside what the devices hold.

    Args:
      src: what `open_checkpoint` takes, or its result.
      cfg: the model; by default that of the checkpoint. Its shapes must be the checkpoint's.
      stacked: one stack a run of equal layers, or one run a layer (docs/architecture.md).
      shardings: a tree of `jax.sharding.Sharding` like the parameters in that layout. Each process then reads only the
        slices that its devices hold. None: everything on the default device.
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src)
    cfg = cfg or checkpoint.cfg
    shapes = param_shapes(cfg, stacked=stacked)
    if param_shapes(cfg) != param_shapes(checkpoint.cfg):
        raise UserError(f"{checkpoint.folder}: the weights are of a model of other shapes than the configuration given")
    parts: dict[str, list[tuple[tuple[int, ...], Slot]]] = {path: [] for path in shapes}
    for place, stored in zip(names.slots(cfg, stacked=stacked), checkpoint.slots, strict=True):
        parts[place.path].append((place.index, stored))
    given = flat(shardings) if shardings is not None else {}
    leaves: dict[str, Any] = {}
    with ThreadPoolExecutor(thread_name_prefix="read-weights") as pool:
        for path, shape in shapes.items():
            leaf = _Leaf(checkpoint.reader, shape, parts[path], DTYPES[dtype], pool)
            array = (jax.device_put(leaf.read((slice(None),) * len(shape))) if shardings is None
                     else jax.make_array_from_callback(shape, given[path], leaf.read))
            leaves[path] = array
    return nested(leaves)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of the tree, assembled from the stored tensors that lie in it."""

    reader: Reader
    shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], Slot]]
    wanted: np.dtype | None
    pool: ThreadPoolExecutor

    def read(self, index: Any) -> np.ndarray:
        """The part of the leaf that `index` (a tuple of slices of step 1) selects, as a new array."""
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        dtype = self.wanted or np.result_type(*{self.reader.dtype(slot) for _, slot in self.parts})
        out = _empty_aligned(tuple(len(r) for r in ranges), dtype)
        lead = len(self.parts[0][0])
        rows, rest = ranges[lead], tuple(slice(r.start, r.stop) for r in ranges[lead + 1:])

        def fill(job: tuple[tuple[int, ...], Slot, int, int]) -> None:
            position, slot, start, stop = job
            piece = self.reader.rows(slot, start, stop)[(slice(None), *rest)]
            out[position][start - rows.start:stop - rows.start] = piece

        jobs = [(tuple(i - r.start for i, r in zip(place, ranges, strict=False)), slot,
                 max(start, rows.start), min(stop, rows.stop))
                for place, slot in self.parts if all(i in r for i, r in zip(place, ranges, strict=False))
                for start, stop in blocks(slot.shape, dtype) if start < rows.stop and stop > rows.start]
        for _ in self.pool.map(fill, jobs):
            pass
        return out


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start:start + size].view(dtype).reshape(shape)
