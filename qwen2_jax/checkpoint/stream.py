"""Orbax checkpoints read and written slice by slice through TensorStore, in memory bounded by a few pieces.

`StandardCheckpointer.save` wants whole arrays, and a stack of all layers or experts is many times the largest Hugging
Face tensor. So Orbax itself writes the skeleton of the checkpoint (its metadata files) from one-element arrays of the
same tree, and each array folder is then replaced by a Zarr array of the true shape whose files hold rows of one layer
and one expert, in parts that can be read one by one (Zarr 3, codec `sharding_indexed`), each with a checksum. The
skeleton is written from numpy arrays: such a checkpoint names no device, so `StandardCheckpointer().restore(path)`
opens it on any platform, and with a target of sharded `ShapeDtypeStruct`s each process reads its own parts.
"""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy by name
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import block_rows, part_rows
from qwen2_jax.checkpoint.tree import nested
from qwen2_jax.errors import UserError

METADATA = "_METADATA"
READABLE = ("bfloat16", "float16", "float32")
_IN_FLIGHT = 4
_LATER = ts.Context({"file_io_sync": False})  # `staging` flushes everything to disk before it gives the folder its name


class TreeWriter:
    """Writes a parameter tree as an Orbax checkpoint at `folder`, which must not exist; pieces may come in any order.

    `dtypes` go with `slots`; all slots of a leaf share one.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], slots: Sequence[Slot],
                 dtypes: Sequence[np.dtype]):
        leaf_dtypes = {slot.path: dtype for slot, dtype in zip(slots, dtypes, strict=True)}
        skeleton = nested({path: np.zeros(1, dtype) for path, dtype in leaf_dtypes.items()})
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(skeleton))
        self._arrays: dict[str, ts.TensorStore] = {}
        for slot in slots:
            if slot.path in self._arrays:
                continue
            array, dtype = folder / slot.path.replace("/", "."), leaf_dtypes[slot.path]
            if not (array / "zarr.json").exists():
                raise AssertionError(f"Orbax did not lay out {array} as one Zarr array a folder")
            shutil.rmtree(array)
            self._arrays[slot.path] = ts.open({
                "driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}, "create": True,
                "metadata": _layout(shapes[slot.path], slot, dtype),
                "store_data_equal_to_fill_value": True}, context=_LATER).result()
        self._waiting: collections.deque[ts.Future] = collections.deque()

    def write(self, slot: Slot, start: int, piece: np.ndarray) -> None:
        """Queues rows [start, start + len(piece)) of a slot; waits once a few pieces are under way."""
        view = self._arrays[slot.path][(*slot.index, slice(start, start + len(piece)))]
        self._waiting.append(view.write(piece, can_reference_source_data_indefinitely=True).commit)
        while len(self._waiting) > _IN_FLIGHT:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Returns when no write is under way any more; raises the first error of those that were."""
        errors = []
        while self._waiting:
            try:
                self._waiting.popleft().result()
            except (ValueError, RuntimeError) as e:
                errors.append(e)
        if errors:
            raise errors[0]


class TreeReader:
    """Reads an Orbax checkpoint of a stacked parameter tree: ours, or one that Orbax's own writers made."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            metadata = json.loads((folder / METADATA).read_text("utf-8"))
            leaves = {"/".join(str(key["key"]) for key in entry["key_metadata"])
                      for entry in metadata["tree_metadata"].values()}
            ocdbt, driver = metadata.get("use_ocdbt", True), "zarr3" if metadata.get("use_zarr3") else "zarr"
        except OSError as e:
            raise UserError(f"cannot read {folder / METADATA}: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{folder / METADATA} is not the metadata of an Orbax checkpoint ({e!r})") from e
        self._arrays = {path: self._open(path.replace("/", "."), driver, ocdbt) for path in sorted(leaves)}

    def _open(self, name: str, driver: str, ocdbt: bool) -> ts.TensorStore:
        base = {"driver": "file", "path": f"{self.folder}/"}
        kvstore = ({"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt
                   else {"driver": "file", "path": f"{self.folder}/{name}/"})
        try:
            array = ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True).result()
            # a lost chunk would read as zeros
            complete = not array.size or array.storage_statistics(query_fully_stored=True).result().fully_stored
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{self.folder}: array {name} cannot be opened: {_first_line(e)}") from e
        if not complete:
            raise UserError(f"{self.folder}: array {name} lacks some of its chunks; the checkpoint is incomplete")
        return array

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError unless the checkpoint holds exactly the leaves of `shapes`, in dtypes that can be read."""
        for path in shapes:
            if path not in self._arrays:
                raise UserError(f"{self.folder}: parameter {path} is missing: config.json and weights do not belong"
                                " together")
        for path, array in self._arrays.items():
            if path not in shapes:
                raise UserError(f"{self.folder}: unexpected parameter {path}: the model of config.json has none such")
            if tuple(array.shape) != tuple(shapes[path]):
                raise UserError(f"{self.folder}: {path} has shape {list(array.shape)}, config.json needs"
                                f" {list(shapes[path])}")
            if array.dtype.name not in READABLE:
                raise UserError(f"{self.folder}: {path} is stored as {array.dtype.name}; only {', '.join(READABLE)} can"
                                " be read")

    def dtype(self, slot: Slot) -> np.dtype:
        return self._arrays[slot.path].dtype.numpy_dtype

    def rows(self, slot: Slot, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Rows [start, stop) of the slot's first axis, or `columns` of them, in the stored dtype, as a new array."""
        wanted = (*slot.index, slice(start, stop), *(() if columns is None else (columns,)))
        try:
            return self._arrays[slot.path][wanted].read().result()
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{self.folder}: {slot.path} cannot be read: {_first_line(e)}") from e


def _layout(shape: Sequence[int], slot: Slot, dtype: np.dtype) -> dict[str, Any]:
    """Zarr's metadata of an array: a file is a piece of one layer and one expert, and consists of parts."""
    def rows(count: int) -> list[int]:
        return [*(1 for _ in slot.index), count, *slot.shape[1:]]

    part = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}},
            {"name": "crc32c"}]
    return {
        "shape": list(shape), "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": rows(block_rows(slot.shape, dtype))}},
        "codecs": [{"name": "sharding_indexed",
                    "configuration": {"chunk_shape": rows(part_rows(slot.shape, dtype)), "codecs": part}}],
    }


def _first_line(e: Exception) -> str:
    return str(e).splitlines()[0] if str(e) else type(e).__name__
