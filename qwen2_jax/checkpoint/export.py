"""Weights of a live program into a checkpoint of either kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax.checkpoint import names
from qwen2_jax.checkpoint.convert import DtypeName, Kind, parse_size, write_checkpoint
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.tree import flat
from qwen2_jax.config import ModelConfig
from qwen2_jax.ops.quant import refuse_quantized
from qwen2_jax.shapes import param_shapes


class LiveReader:
    """Reads a tree of arrays in memory, in either layout, as if it were a checkpoint."""

    def __init__(self, params: Mapping[str, Any], cfg: ModelConfig):
        leaves = flat(params)
        stacked = next((s for s in (True, False) if param_shapes(cfg, stacked=s).keys() == leaves.keys()), None)
        if stacked is None:
            raise ValueError(f"the tree is not one of {cfg.layers} layers in either layout: {sorted(leaves)[:5]}…")
        for path, shape in param_shapes(cfg, stacked=stacked).items():
            if leaves[path].shape != shape:
                raise ValueError(f"{path} has shape {leaves[path].shape}, the configuration needs {shape}")
            if not getattr(leaves[path], "is_fully_addressable", True):
                raise ValueError(f"{path} is spread over several processes; save it with Store")
        self._leaves = leaves
        self._places = {slot.name: slot for slot in names.slots(cfg, stacked=stacked)}

    def dtype(self, slot: Slot) -> np.dtype:
        return np.dtype(self._leaves[self._places[slot.name].path].dtype)

    def rows(self, slot: Slot, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor, or `columns` of them, as a new host array."""
        if columns is not None:
            return self.rows(slot, start, stop)[:, columns]
        place = self._places[slot.name]
        leaf = self._leaves[place.path]
        if not isinstance(leaf, jax.Array):
            return np.array(leaf[(*place.index, slice(start, stop))])
        wanted = [*(range(i, i + 1) for i in place.index), range(start, stop), *(range(n) for n in slot.shape[1:])]
        out = np.empty([len(r) for r in wanted], leaf.dtype)
        for shard in leaf.addressable_shards:
            held = [range(*s.indices(n)) for s, n in zip(shard.index, leaf.shape, strict=True)]
            both = [range(max(w.start, h.start), min(w.stop, h.stop)) for w, h in zip(wanted, held, strict=True)]
            if shard.replica_id == 0 and all(both):
                here = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(both, wanted, strict=True))
                starts = [b.start - h.start for b, h in zip(both, held, strict=True)]
                out[here] = _to_host(shard.data, starts, [len(b) for b in both])
        return out.reshape(stop - start, *slot.shape[1:])


def _to_host(shard: jax.Array, starts: list[int], sizes: list[int]) -> np.ndarray:
    """A block of one device's array; only that block leaves the device."""
    if shard.devices().pop().platform == "cpu":  # there, asarray is a view
        return np.asarray(shard)[tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))]
    return np.asarray(jax.lax.dynamic_slice(shard, starts, sizes))  # starts are arguments: equal shapes compile once


def save_params(params: Mapping[str, Any], cfg: ModelConfig, dst: str | Path, *, dtype: DtypeName = "keep",
                beside: str | Path | None = None) -> None:
    """Writes a live tree, in either layout, as an Orbax checkpoint (stacked on disk) with its configuration.

    `beside` is a folder whose tokenizer files and generation settings are copied. Raises UserError as `convert` does,
    and for a quantized tree.
    """
    _write(params, cfg, dst, to="orbax", dtype=dtype, limit=parse_size("5GB"), beside=beside)


def export_hf(params: Mapping[str, Any], cfg: ModelConfig, dst: str | Path, *, dtype: DtypeName = "keep",
              max_shard_size: int | str = "5GB", beside: str | Path | None = None) -> None:
    """Writes a live tree, in either layout, as a Hugging Face folder; `beside` as in `save_params`."""
    _write(params, cfg, dst, to="safetensors", dtype=dtype, limit=parse_size(max_shard_size), beside=beside)


def _write(params: Mapping[str, Any], cfg: ModelConfig, dst: str | Path, *, to: Kind, dtype: DtypeName, limit: int,
           beside: str | Path | None) -> None:
    refuse_quantized(params, f"{dst}: a checkpoint")
    reader = LiveReader(params, cfg)
    stored = reader.dtype(names.slots(cfg)[0]).name if dtype == "keep" else dtype
    write_checkpoint(reader, dataclasses.replace(cfg, dtype=stored), Path(dst), to=to, dtype=dtype,
                     max_shard_bytes=limit, beside=None if beside is None else Path(beside))
