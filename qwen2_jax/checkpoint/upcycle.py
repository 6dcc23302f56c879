"""A mixture of experts made of a dense checkpoint, a piece at a time: `fine_grained.py` says how."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen2_jax.checkpoint.convert import DTYPES, KINDS, DtypeName, Kind, check_choice, parse_size, write_checkpoint
from qwen2_jax.checkpoint.fine_grained import (
    Expert,
    Part,
    Upcycling,
    draws,
    expert_rows,
    layer_copies,
    layer_experts,
    normal_rows,
    occurrences,
)
from qwen2_jax.checkpoint.hub import expand_user
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import blocks
from qwen2_jax.checkpoint.source import Checkpoint, open_checkpoint
from qwen2_jax.config import HF_FIELD, ModelConfig, MoeConfig
from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)

REPORT = Upcycling()
_SUMMED = 2**16     # elements at a time: fixed, so that a sum does not depend on how the matrix was read


@dataclass(frozen=True)
class Upcycled:
    """What was made: the model, how many copies of each dense network were cut up, and how many times at least and at
    most a dense unit occurs in the routed experts of a layer."""

    cfg: ModelConfig
    copies: int
    least: int
    most: int


def upcycle(src: str | Path, dst: str | Path, moe: MoeConfig, how: Upcycling = REPORT, *, to: Kind,
            like: ModelConfig | None = None, dtype: DtypeName = "keep", max_shard_size: int | str = "5GB",
            revision: str | None = None, ignore: Sequence[str] = (), progress: bool = False) -> Upcycled:
    """Makes a mixture-of-experts checkpoint of a dense one. `dst` appears complete or not at all.

    Host memory stays within two of the dense network's matrices and a few pieces of 16 MiB. The result does not depend
    on the order of reading, the size of pieces, or the kinds of `src` and `dst`.

    Args:
      src: a dense model's checkpoint, as `convert` takes it.
      dst: the folder to make, as `convert` does.
      moe: the experts. With `how.preserve`, `top_k` becomes the number of experts.
      to: `orbax` or `safetensors`.
      like: a model that the result is to resemble: its width, layers and heads must be the source's, and rows of the
        vocabulary beyond its own, which are padding, are dropped.
      dtype: what to store; `keep` takes that of the source. Elements are drawn, and scaled, in float32.
      max_shard_size, revision, ignore, progress: as `convert` has them.

    Raises:
      UserError: what `convert` refuses; a source that is not a dense language model; sizes that do not go together;
        `preserve` where a unit of the dense network would be in no expert.
    """
    check_choice("to", to, KINDS)
    check_choice("dtype", dtype, tuple(DTYPES))
    limit = parse_size(max_shard_size)
    source = open_checkpoint(src, revision=revision, ignore=ignore)
    cfg = _target(source.cfg, moe, how, like, src)
    if dtype != "keep":
        cfg = dataclasses.replace(cfg, dtype=dtype)
    made = _count(cfg, how)
    if how.preserve and cfg.dtype != "float32":
        log.warning("%s rounds the scaled down projections: with --dtype float32 the output stays the dense model's to"
                    " 1e-5", cfg.dtype)
    write_checkpoint(UpcycledReader(source, cfg, how, DTYPES[dtype]), cfg, expand_user(dst), to=to, dtype=dtype,
                     max_shard_bytes=limit, beside=source.folder, progress=progress, label="upcycle")
    return made


class UpcycledReader:
    """The tensors of the sparse model `cfg`, made out of those of a dense checkpoint when they are asked for.

    Keeps one matrix of the dense network, and a thread may still be at work on the one before. `dtype` None keeps that
    of the source.
    """

    def __init__(self, source: Checkpoint, cfg: ModelConfig, how: Upcycling, dtype: np.dtype | None):
        self._reader, self._cfg, self._how, self._wanted = source.reader, cfg, how, dtype
        self._by_name = {slot.name: slot for slot in source.slots}
        # A dense model is one run of layers, so the index in it is the layer.
        self._dense = {(slot.index[0], slot.path.rpartition("/")[2]): slot
                       for slot in source.slots if "/mlp/" in slot.path}
        self._starts = {run.name: run.start for run in cfg.layer_runs()}
        self._lock = threading.Lock()
        self._held: tuple[str, np.ndarray, float] | None = None
        self._experts = functools.lru_cache(maxsize=2)(functools.partial(layer_experts, how, _moe(cfg), cfg.d_ff))

    def dtype(self, slot: Slot) -> np.dtype:
        return self._wanted or self._reader.dtype(self._origin(slot))

    def rows(self, slot: Slot, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor, or `columns` of them, as a new array."""
        dtype, copied = self.dtype(slot), self._by_name.get(slot.name)
        if copied is not None:
            return self._reader.rows(copied, start, stop, columns).astype(dtype, copy=False)
        rows = self._made(slot, start, stop, dtype)
        return rows if columns is None else rows[:, columns]

    def _made(self, slot: Slot, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        draw = functools.partial(draws, self._how.seed, slot.name)
        layer, name = self._layer(slot), slot.path.rpartition("/")[2]
        if name.endswith("router"):
            return normal_rows(start, stop, slot.shape[1], self._router_std(name), draw, dtype)
        part = cast(Part, name.removeprefix("shared_"))
        with self._lock:    # the matrix is read once, not by each of several threads
            routed, shared = self._experts(layer)
            dense, std = self._matrix(self._dense[layer, part])
        expert: Expert = shared if name.startswith("shared_") else routed[slot.index[1]]
        return expert_rows(part, expert, start, stop, dense, std, draw, dtype)

    def _router_std(self, name: str) -> float:
        if name == "shared_router":
            return self._how.shared_gate_std
        if self._how.preserve:
            return 0.0
        return self._cfg.init_std if self._how.router_std is None else self._how.router_std

    def _matrix(self, slot: Slot) -> tuple[np.ndarray, float]:
        """A matrix of the dense network, and the standard deviation of what is drawn in its place."""
        if self._held is None or self._held[0] != slot.name:
            self._held = None   # let go of the last one before the next is read
            dtype = self._reader.dtype(slot)
            matrix = np.empty(slot.shape, dtype)
            for start, stop in blocks(slot.shape, dtype):
                matrix[start:stop] = self._reader.rows(slot, start, stop)
            std = self._cfg.init_std if self._how.init == "config" else standard_deviation(matrix)
            self._held = slot.name, matrix, std
        return self._held[1:]

    def _origin(self, slot: Slot) -> Slot:
        """The tensor of the source that a tensor is made of; for routers, which come from none, the layer's gate."""
        name = slot.path.rpartition("/")[2]
        part = "gate" if name.endswith("router") else name.removeprefix("shared_")
        return self._by_name.get(slot.name) or self._dense[self._layer(slot), part]

    def _layer(self, slot: Slot) -> int:
        return self._starts[slot.path.partition("/")[0]] + slot.index[0]


def standard_deviation(matrix: np.ndarray) -> float:
    """Of all elements of a matrix, summed in float64."""
    total, squares, step = 0.0, 0.0, math.ceil(_SUMMED / matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = matrix[start:start + step].astype(np.float64)
        total, squares = total + rows.sum(), squares + np.square(rows).sum()
    return float(np.sqrt(max(0.0, squares / matrix.size - (total / matrix.size) ** 2)))


def _target(dense: ModelConfig, moe: MoeConfig, how: Upcycling, like: ModelConfig | None, src: Any) -> ModelConfig:
    """The model to make; raises UserError where it cannot be made of `dense`."""
    if dense.moe is not None:
        raise UserError(f"{src} is a mixture of {dense.moe.experts} experts already: upcycling takes a dense model")
    if dense.head != "lm":
        raise UserError(f"{src} has a {dense.head} head: upcycling takes a model with a vocabulary head")
    if how.preserve:
        moe = dataclasses.replace(moe, top_k=moe.experts)
    elif how.router_std == 0 and moe.top_k < moe.experts:
        raise UserError(f"a router of zeros makes all experts equal, and the first {moe.top_k} of {moe.experts} would"
                        " get every token: give router_std, or choose all experts")
    # Which layers are windowed is counted in another way where there are experts, so it is said layer by layer.
    window = dense.window
    if window.active:
        kinds = tuple("sliding_attention" if windowed else "full_attention" for windowed in dense.windowed_layers())
        window = dataclasses.replace(window, layer_types=kinds)
    cfg = dataclasses.replace(dense, moe=moe, window=window, vocab=_vocab(dense, like, src))
    if not any(cfg.is_sparse(i) for i in range(cfg.layers)):
        raise UserError(f"none of the {cfg.layers} layers of {src} would get experts: check decoder_sparse_step"
                        f" {moe.sparse_step} and mlp_only_layers")
    return cfg


def _vocab(dense: ModelConfig, like: ModelConfig | None, src: Any) -> int:
    """Rows of embedding and head to keep."""
    if like is None:
        return dense.vocab
    for field in ("d_model", "layers", "heads", "kv_heads", "head_dim", "tied"):
        wanted, found = getattr(like, field), getattr(dense, field)
        if wanted != found:
            raise UserError(f"{src} has {HF_FIELD.get(field, 'tie_word_embeddings')} {found}, the model to resemble has"
                            f" {wanted}: give the experts' number and widths by themselves")
    beyond = [i for i in (dense.bos_id, dense.pad_id, *dense.eos_ids) if i is not None and i >= like.vocab]
    if like.vocab > dense.vocab or beyond:
        raise UserError(f"{src} has a vocabulary of {dense.vocab} rows"
                        + (f" and the special token {beyond[0]}" if beyond else "")
                        + f", the model to resemble {like.vocab}: give the experts' number and widths by themselves")
    return like.vocab


def _count(cfg: ModelConfig, how: Upcycling) -> Upcycled:
    """Cuts all layers up without reading any weights; raises UserError where `preserve` would lose a unit."""
    moe = _moe(cfg)
    least, most = moe.experts * moe.d_expert, 0
    for layer in filter(cfg.is_sparse, range(cfg.layers)):
        routed, _ = layer_experts(how, moe, cfg.d_ff, layer)
        times_U = occurrences(np.stack([expert.units_F for expert in routed]), cfg.d_ff)
        least, most = min(least, int(times_U.min())), max(most, int(times_U.max()))
        lost = int((times_U == 0).sum())
        if how.preserve and lost:
            raise UserError(
                f"preserve needs every one of the dense network's {cfg.d_ff} units in some expert, but {moe.experts}"
                f" experts of width {moe.d_expert} leave out {lost} in layer {layer}: "
                + ("make more or wider ones" if moe.experts * moe.d_expert < cfg.d_ff else "take cut across"))
    return Upcycled(cfg, layer_copies(how, moe, cfg.d_ff), least, most)


def _moe(cfg: ModelConfig) -> MoeConfig:
    assert cfg.moe is not None
    return cfg.moe
