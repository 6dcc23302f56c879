"""Weights from a checkpoint into JAX arrays, in the layout and on the devices that a program wants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
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
from qwen2_jax.ops.quant import Int8, Quant, check_quant, quantize_rows
from qwen2_jax.shapes import is_quantized, param_shapes

_ALIGN = 64  # XLA's CPU client takes over a numpy buffer without a copy when it is aligned so


def load_params(src: str | Path | Checkpoint, cfg: ModelConfig | None = None, *, dtype: DtypeName, stacked: bool,
                shardings: Mapping[str, Any] | None = None, quant: Quant = None) -> dict[str, Any]:
    """The parameter tree of a checkpoint as JAX arrays of `dtype` ("bfloat16", "float32" or "keep").

    Leaves are filled one after the other, so the host holds one leaf beside what the devices hold. With `quant` each
    piece of a matrix is quantized as it is read, so neither host nor device holds more of it than a piece before.

    Args:
      src: what `open_checkpoint` takes, or its result.
      cfg: the model; by default that of the checkpoint. Its shapes must be the checkpoint's.
      stacked: one stack a run of equal layers, or one run a layer (docs/architecture.md).
      shardings: a tree of `jax.sharding.Sharding` like the parameters in that layout. Each process then reads only the
        slices that its devices hold. None: everything on the default device.
      quant: "int8" makes matrices `ops.quant.Int8`, from the weights as they are stored, whatever `dtype` is.
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    check_quant(quant)
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src)
    checkpoint.refuse_damage(share=(jax.process_index(), jax.process_count()))
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
            if quant and is_quantized(path):
                leaves[path] = leaf.quantized(given.get(path))
            elif shardings is None:
                leaves[path] = jax.device_put(leaf.read((slice(None),) * len(shape)))
            else:
                leaves[path] = jax.make_array_from_callback(shape, given[path], _once(leaf.read, shape, given[path]))
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
        ranges = _ranges(index, self.shape)
        out = _empty_aligned(tuple(map(len, ranges)), self._dtype)

        def put(at: tuple[Any, ...], rows: np.ndarray, columns: tuple[slice, ...]) -> None:
            out[at] = rows[(slice(None), *columns)]

        self._each_piece(ranges, put, whole_rows=False)
        return out

    def read_int8(self, index: Any) -> Int8:
        """The same part quantized, in new arrays. A row's scale is that of the whole row, whatever part is wanted."""
        ranges = _ranges(index, self.shape)
        size = tuple(map(len, ranges))
        out = Int8(_empty_aligned(size, np.dtype(np.int8)), _empty_aligned(size[:-1], np.dtype(np.float32)))

        def put(at: tuple[Any, ...], rows: np.ndarray, columns: tuple[slice, ...]) -> None:
            rows_int8 = quantize_rows(rows, np)
            out.values[at], out.scale[at] = rows_int8.values[(slice(None), *columns)], rows_int8.scale

        self._each_piece(ranges, put, whole_rows=True)
        return out

    def quantized(self, where: Int8 | None) -> Int8:
        """The leaf on the devices; `where` holds the shardings of its two arrays, None the default device."""
        if where is None:
            return jax.device_put(self.read_int8((slice(None),) * len(self.shape)))
        part = _once(self.read_int8, self.shape, where.values)
        pieces = [jax.device_put(part(index), device)
                  for device, index in where.values.addressable_devices_indices_map(self.shape).items()]

        def whole(shape: tuple[int, ...], sharding: Any, arrays: list[Any]):
            return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

        return Int8(whole(self.shape, where.values, [p.values for p in pieces]),
                    whole(self.shape[:-1], where.scale, [p.scale for p in pieces]))

    @property
    def _dtype(self) -> np.dtype:
        return self.wanted or np.result_type(*{self.reader.dtype(slot) for _, slot in self.parts})

    def _each_piece(self, ranges: list[range], put: Callable[[tuple[Any, ...], np.ndarray, tuple[slice, ...]], None],
                    *, whole_rows: bool) -> None:
        """Read the stored rows in `ranges`, piece by piece, several at a time: `put(where in the result, rows, the
        columns still to be taken of them)`. None are where not `whole_rows`, and only those wanted have been read."""
        lead = len(self.parts[0][0])
        wanted, columns = ranges[lead], tuple(slice(r.start, r.stop) for r in ranges[lead + 1:])

        def fill(job: tuple[tuple[int, ...], Slot, int, int]) -> None:
            position, slot, start, stop = job
            rows = self.reader.rows(slot, start, stop, *(() if whole_rows else columns))
            put((*position, slice(start - wanted.start, stop - wanted.start)), rows, columns if whole_rows else ())

        jobs = [(tuple(i - r.start for i, r in zip(place, ranges, strict=False)), slot,
                 max(start, wanted.start), min(stop, wanted.stop))
                for place, slot in self.parts if all(i in r for i, r in zip(place, ranges, strict=False))
                for start, stop in blocks(slot.shape, self._dtype) if start < wanted.stop and stop > wanted.start]
        for _ in self.pool.map(fill, jobs):
            pass


def _once(read: Callable[[Any], Any], shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[[Any], Any]:
    """`read`, called once for what several devices of this process want: the same part, or columns side by side."""
    wanted: dict[str, set[tuple[int, int]]] = {}      # rows → columns, first and one past the last
    for index in sharding.addressable_devices_indices_map(shape).values():
        *rows, columns = _ranges(index, shape)
        wanted.setdefault(str(rows), set()).add((columns.start, columns.stop))
    found: dict[tuple[str, int], Any] = {}

    def part(index: Any) -> Any:
        *rows, columns = _ranges(index, shape)
        around = _joined(wanted[str(rows)], columns.start)
        key = str(rows), around.start
        if key not in found:
            found[key] = read((*index[:-1], slice(around.start, around.stop)))
        mine, whole = slice(columns.start - around.start, columns.stop - around.start), found[key]
        return Int8(whole.values[..., mine], whole.scale) if isinstance(whole, Int8) else whole[..., mine]

    return part


def _joined(spans: Collection[tuple[int, int]], place: int) -> range:
    """The longest range around `place` that the spans cover without a gap."""
    joined: list[list[int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return next(range(start, stop) for start, stop in joined if start <= place < stop)


def _ranges(index: Any, shape: tuple[int, ...]) -> list[range]:
    return [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start:start + size].view(dtype).reshape(shape)
