"""Hugging Face weights: a folder or file of safetensors, read and written piece by piece.

`HfReader` and `HfWriter` speak of slots (`names.Slot`) and rows of their first axis, as `stream.TreeReader` and
`TreeWriter` do for Orbax; `convert.copy` joins any reader to any writer.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen2_jax.checkpoint import names
from qwen2_jax.checkpoint.json_fields import read_object
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import blocks
from qwen2_jax.checkpoint.safetensors_format import DTYPES, StoredTensor, plan_header, read_header
from qwen2_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes, on the common file systems


class HfReader:
    """The tensors of a folder (index, single file or loose shards) or of one `.safetensors` file."""

    def __init__(self, src: Path):
        self.src = src
        self._stored = _join([read_header(file) for file in _files(src)])
        _check_index(src, self._stored)

    def check(self, slots: Sequence[Slot], *, tied: bool, lm: bool) -> None:
        """Raises UserError unless the files hold exactly the tensors of `slots`, in dtypes that can be read.

        Passed over: rotary buffers; the vocabulary head of a reward model (`lm` false), which nothing reads; and that
        of a tied model, as long as it equals the embedding.
        """
        by_name = {slot.name: slot for slot in slots}
        for name, stored in self._stored.items():
            if names.is_inert(name):
                continue
            if stored.code not in DTYPES:
                raise UserError(f"{stored.file}: {name} is stored as {stored.code}; only {', '.join(DTYPES)} can be"
                                " read, quantised checkpoints cannot: use the unquantised one")
            if name == names.LM_HEAD and name not in by_name:
                if tied or not lm:
                    continue
            if name not in by_name:
                raise UserError(f"{stored.file}: unexpected tensor {name}: the model that config.json describes has no"
                                " such parameter")
            if stored.shape != by_name[name].shape:
                raise UserError(f"{stored.file}: {name} has shape {list(stored.shape)}, config.json needs"
                                f" {list(by_name[name].shape)}")
        missing = [slot.name for slot in slots if slot.name not in self._stored]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.src}: tensor {missing[0]} is missing{more}: config.json and weights do not belong"
                            " together, or a download is incomplete")
        if tied and names.LM_HEAD in self._stored and names.LM_HEAD not in by_name:
            self._need_equal(names.LM_HEAD, names.EMBED)

    def _need_equal(self, head: str, embed: str) -> None:
        a, b = self._stored[head], self._stored[embed]
        equal = a.shape == b.shape and a.code == b.code
        if equal:
            equal = all((a.rows(i, j).view(np.uint8) == b.rows(i, j).view(np.uint8)).all()
                        for i, j in blocks(a.shape, a.dtype))
        if not equal:
            raise UserError(f"{a.file}: {head} differs from {embed}, but config.json says tie_word_embeddings true:"
                            " set it to false to keep both, or remove the tensor")

    def dtype(self, slot: Slot) -> np.dtype:
        return self._stored[slot.name].dtype

    def rows(self, slot: Slot, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor's first axis, or `columns` of them, in its stored dtype, as a new array."""
        return self._stored[slot.name].rows(start, stop, columns)


def _files(src: Path) -> list[Path]:
    if not src.is_dir():
        return [src]
    if (src / SINGLE).exists():
        return [src / SINGLE]
    if (src / INDEX).exists():
        files = [src / name for name in sorted(set(_read_index(src / INDEX).values()))]
        for file in files:
            if not file.exists():
                raise UserError(f"{src / INDEX} names the shard {file.name}, which is not in the folder")
        return files
    loose = sorted(src.glob("*.safetensors"))
    if loose:
        return loose
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in src.glob(pattern))
    if pickled:
        raise UserError(f"{src} holds pickled weights only ({pickled[0]}), which can run code when opened: convert them"
                        " once with transformers, AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)")
    raise UserError(f"{src} holds no weights: no {SINGLE}, no {INDEX}, no other .safetensors file, no Orbax checkpoint")


def _read_index(file: Path) -> dict[str, str]:
    shards = read_object(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{file} has no weight_map from tensor names to shard files")
    for name, shard in shards.items():
        if not name.isprintable():
            raise UserError(f"{file}: a tensor name holds unprintable characters")
        if (not isinstance(shard, str) or not shard.isprintable() or shard in ("", ".", "..") or "/" in shard
                or len(os.fsencode(shard)) > _LONGEST_NAME):
            raise UserError(f"{file}: {name} points to {shard!r:.300}, which is not the name of a file in the folder")
    return shards


def _check_index(src: Path, stored: dict[str, StoredTensor]) -> None:
    if not src.is_dir() or (src / SINGLE).exists() or not (src / INDEX).exists():
        return
    headers: dict[str, set[str]] = {}
    for name, shard in _read_index(src / INDEX).items():
        if shard not in headers:
            headers[shard] = set(read_header(src / shard))
        if name not in headers[shard]:
            raise UserError(f"{src / INDEX} says that {name} is in {shard}, which does not hold it")


def _join(headers: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """One table over all files, with tensors that hold all experts of a layer taken apart."""
    joined: dict[str, StoredTensor] = {}
    for header in headers:
        for name, stored in header.items():
            parts = names.fused_experts(name, stored.shape) if stored.code in DTYPES else None
            taken = [(name, stored)] if parts is None else [
                (part, StoredTensor(stored.file, stored.code, shape, stored.begin + first * stored.dtype.itemsize))
                for part, shape, first in parts]
            for part, place in taken:
                part = names.with_prefix(part)
                if part in joined:
                    raise UserError(f"{part} is stored twice: in {joined[part].file.name} and in {place.file.name}")
                joined[part] = place
    return joined


class HfWriter:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (header included) and their index.

    A tensor larger than the limit has a shard to itself. Space for all files is taken at once, so that a full disk is
    known before hours of copying.
    """

    def __init__(self, folder: Path, slots: Sequence[Slot], dtypes: Sequence[np.dtype], *, max_shard_bytes: int):
        self._places: dict[str, tuple[Path, int]] = {}
        shards = _fill_shards(slots, dtypes, max_shard_bytes)
        weight_map = {}
        for n, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
            lead, offsets = plan_header(shard)
            last = next(reversed(shard))
            with open(folder / name, "wb") as f:
                _take_space(f.fileno(), offsets[last] + _bytes(shard[last]))
                f.write(lead)
            for tensor, offset in offsets.items():
                self._places[tensor] = (folder / name, offset)
                weight_map[tensor] = name
        if len(shards) > 1:
            total = sum(_bytes(spec) for shard in shards for spec in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, slot: Slot, start: int, piece: np.ndarray) -> None:
        """Writes `piece` as rows [start, start + len(piece)) of the tensor."""
        file, begin = self._places[slot.name]
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        offset = begin + start * math.prod(slot.shape[1:]) * piece.dtype.itemsize
        with open(file, "r+b", buffering=0) as f:
            while data:
                n = os.pwrite(f.fileno(), data, offset)
                data, offset = data[n:], offset + n

    def close(self) -> None:
        """Nothing is held open."""


def _take_space(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot reserve space
            raise
        os.ftruncate(fd, size)


Spec = tuple[np.dtype, tuple[int, ...]]


def _bytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def _fill_shards(slots: Sequence[Slot], dtypes: Sequence[np.dtype], limit: int) -> list[dict[str, Spec]]:
    """Tensors in order, a new shard when the next would not fit; within a shard wider dtypes first, for alignment."""
    shards: list[dict[str, Spec]] = [{}]
    used = 0
    for slot, dtype in zip(slots, dtypes, strict=True):
        spec = (dtype, slot.shape)
        # at most what this tensor adds: data, and its header entry with offsets of 20 digits
        needed = _bytes(spec) + len(json.dumps(slot.name)) + len(str(list(slot.shape))) + 96
        if shards[-1] and used + needed > limit:
            shards.append({})
        if not shards[-1]:
            used = len(plan_header({})[0]) + 8
        shards[-1][slot.name] = spec
        used += needed
    return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]
