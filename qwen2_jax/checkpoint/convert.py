"""The journey of a checkpoint: open, copy piece by piece under a temporary name, compare, rename."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from tqdm import tqdm

from qwen2_jax.checkpoint import files, names
from qwen2_jax.checkpoint.hf import HfWriter
from qwen2_jax.checkpoint.hub import expand_user
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import Reader, Writer, read_ahead
from qwen2_jax.checkpoint.source import PARAMS, Checkpoint, open_checkpoint
from qwen2_jax.checkpoint.staging import staged
from qwen2_jax.checkpoint.verify import Comparison, compare
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.shapes import param_shapes

Kind = Literal["orbax", "safetensors"]
DtypeName = Literal["bfloat16", "float32", "keep"]
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "keep": None}
KINDS = ("orbax", "safetensors")

# Bytes on disk a byte of weights, at the least: Zarr chunks are compressed, but trained weights not by half.
_LEAST_SIZE = {"safetensors": 1.0, "orbax": 0.5}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def convert(src: str | Path, dst: str | Path, *, to: Kind, dtype: DtypeName = "keep",
            max_shard_size: int | str = "5GB", revision: str | None = None, verify: bool = False,
            ignore: Sequence[str] = (), progress: bool = False) -> Comparison | None:
    """Converts a checkpoint between Hugging Face's form and ours; returns what `verify` found, else None.

    Host memory stays within a few pieces of 16 MiB, however large a stack is. `dst` appears complete or not at all.

    Args:
      src: a Hugging Face folder, a `.safetensors` file with config.json beside it, an Orbax checkpoint, or a hub id.
      dst: the folder to make. For `orbax`: `params/`, which plain Orbax restores; for both: config.json,
        generation_config.json with both stop ids, and the tokenizer's files found beside `src`.
      to: `orbax` or `safetensors`; the same kind as `src` is allowed (other shards, another dtype).
      dtype: what to store; `keep` leaves every bit as it is.
      max_shard_size: bytes a safetensors file, as a number or like "5GB"; one larger tensor still gets a file.
      revision: branch, tag or commit of a hub repository.
      verify: read both sides again before `dst` gets its name, and compare them.
      ignore: fields of config.json to pass over although they are not supported.
      progress: show a bar on stderr.

    Raises:
      UserError: anything wrong with `src` or `dst`, the differences that `verify` finds, or a full disk.
    """
    check_choice("to", to, KINDS)
    check_choice("dtype", dtype, tuple(DTYPES))
    limit = parse_size(max_shard_size)
    src_path, dst_path = expand_user(src), expand_user(dst)
    if src_path.exists() and dst_path.exists() and src_path.samefile(dst_path):
        raise UserError(f"{src} is both source and destination: choose another destination")
    checkpoint = open_checkpoint(src, revision=revision, ignore=ignore)
    checkpoint.refuse_damage()
    cfg = checkpoint.cfg if dtype == "keep" else dataclasses.replace(checkpoint.cfg, dtype=dtype)
    return write_checkpoint(checkpoint.reader, cfg, dst_path, to=to, dtype=dtype, max_shard_bytes=limit,
                            beside=checkpoint.folder, verify=checkpoint if verify else None, progress=progress)


def write_checkpoint(reader: Reader, cfg: ModelConfig, dst: Path, *, to: Kind, dtype: DtypeName, max_shard_bytes: int,
                     beside: Path | None, verify: Checkpoint | None = None, progress: bool = False,
                     label: str = "convert") -> Comparison | None:
    """Copies all tensors of `reader`, which holds the model `cfg`, into a new checkpoint; `convert` has the details.

    `label` stands before the bar.
    """
    slots = names.slots(cfg)
    wanted = DTYPES[dtype]
    dtypes = [wanted if wanted is not None else reader.dtype(slot) for slot in slots]
    if to == "orbax":
        _check_stackable(slots, dtypes)
    size = sum(math.prod(slot.shape) * dtype.itemsize for slot, dtype in zip(slots, dtypes, strict=True))
    with staged(dst, needed=int(size * _LEAST_SIZE[to])) as partial:
        writer = _writer(to, partial, cfg, slots, dtypes, max_shard_bytes)
        files.write_files_beside(partial, cfg, beside)  # first, for that shows in no time what cannot be read
        _copy(reader, writer, slots, dtypes, size if progress else None, label)
        files.write_config(partial, cfg)    # last: what a killed run leaves has none, so nothing opens it
        if to == "orbax":
            files.write_mark(partial)
        return None if verify is None else compare(verify, open_checkpoint(partial), progress=progress)


def _writer(to: Kind, folder: Path, cfg: ModelConfig, slots: list[Slot], dtypes: list[np.dtype],
            max_shard_bytes: int) -> Writer:
    if to == "safetensors":
        return HfWriter(folder, slots, dtypes, max_shard_bytes=max_shard_bytes)

    from qwen2_jax.checkpoint.stream import TreeWriter  # Orbax takes seconds to import

    return TreeWriter(folder / PARAMS, param_shapes(cfg), slots, dtypes)


def _copy(reader: Reader, writer: Writer, slots: list[Slot], dtypes: list[np.dtype], shown_size: int | None,
          label: str) -> None:
    with tqdm(total=shown_size, unit="B", unit_scale=True, desc=label, disable=shown_size is None) as bar:
        try:
            for slot, start, piece in read_ahead(reader, slots, dtypes):
                writer.write(slot, start, piece)
                bar.update(piece.nbytes)
        finally:
            writer.close()  # after an error too: a write still under way would put files into the folder being removed


def _check_stackable(slots: list[Slot], dtypes: list[np.dtype]) -> None:
    first: dict[str, tuple[str, np.dtype]] = {}
    for slot, dtype in zip(slots, dtypes, strict=True):
        name, found = first.setdefault(slot.path, (slot.name, dtype))
        if dtype != found:
            raise UserError(f"{name} is {found.name} but {slot.name} is {dtype.name}: layers are stacked and need one"
                            " dtype; give --dtype bfloat16 or --dtype float32")


def parse_size(size: int | str) -> int:
    """Bytes of 300, "300", "5GB" (10^9) or "5GiB" (2^30). Raises UserError when it is neither or not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    count = 0 if match is None else int(min(float(match[1]), 2**63) * _UNITS.get(match[2].upper(), 0))
    if count <= 0:
        raise UserError(f"--max-shard-size {size} is not a size: write 5GB, 500MB or 2GiB")
    return count


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, listing the choices, unless `value` is one of them."""
    if value not in choices:
        raise UserError(f"{name} '{value}' is not supported: {', '.join(choices)} are")
