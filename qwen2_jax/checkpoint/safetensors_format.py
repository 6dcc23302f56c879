"""The safetensors container: headers in and out, every claim of a file checked against its size.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data without
gaps (https://github.com/huggingface/safetensors, "Format"). We read ranges with `preadv` rather than through a memory
map, so that a file that shrinks meanwhile is an error and not a crash, and write them with `pwrite` at offsets known
from the shapes alone.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen2_jax.errors import UserError

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALLEST_READ = 4096
"""Bytes of a row below which whole rows are read: storage gives no less than a page."""
_HEADER_LIMIT = 100_000_000  # the reference reader refuses more
_MOST_AXES, _LONGEST_TEXT = 32, 500  # of a shape, and of a name or dtype: far more than any model has


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file: `begin` counts bytes from the file's start, `code` is safetensors' dtype name."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    def rows(self, start: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Reads rows [start, stop) of the first axis, of a matrix only `columns` where that is given (a slice of step
        1), into a new array; raises UserError when the file is too short."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        first, last, _ = (columns or slice(None)).indices(self.shape[1]) if len(self.shape) == 2 else (0, 0, 1)
        wanted = (last - first) * self.dtype.itemsize
        if columns is None or wanted == row:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
            self._read(out.reshape(-1), [(self.begin + start * row, (stop - start) * row)])
        elif wanted < SMALLEST_READ:
            out = np.ascontiguousarray(self.rows(start, stop)[:, columns])
        else:
            out = np.empty((stop - start, last - first), self.dtype)
            begin = self.begin + first * self.dtype.itemsize
            self._read(out.reshape(-1), [(begin + i * row, wanted) for i in range(start, stop)])
        return out

    def _read(self, out: np.ndarray, ranges: Sequence[tuple[int, int]]) -> None:
        """Fills `out` from byte ranges (offset, size) of the file, one after the other."""
        view, done = out.view(np.uint8).data, 0
        try:
            with open(self.file, "rb", buffering=0) as f:
                for offset, size in ranges:
                    end = done + size
                    while done < end:
                        n = os.preadv(f.fileno(), [view[done:end]], offset + size - (end - done))
                        if n == 0:
                            raise UserError(f"{self.file} ended before byte {offset + size}: it was cut short")
                        done += n
        except OSError as e:
            raise UserError(f"cannot read {self.file}: {e.strerror}") from e


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names and places of all tensors of a file; raises UserError, naming the file, for anything that does not fit."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):    # opening a pipe would wait for a writer
            raise UserError(f"cannot read {file}: it is no regular file")
        size = status.st_size
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise _corrupt(file, f"its header claims {length} bytes, the file has {size}; it may be cut short")
            raw = f.read(length)
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from e
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise _corrupt(file, f"its header is not valid JSON ({e})") from e
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    tensors, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        code, shape, begin, end = _entry(file, name, entry)
        tensors[name] = StoredTensor(file, code, shape, 8 + length + begin)
        ranges.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(ranges):
        if begin != place:
            raise _corrupt(file, f"the data of {name} starts at byte {begin} where byte {place} was due")
        place = end
    if 8 + length + place != size:
        raise _corrupt(file, f"its tensors need {8 + length + place} bytes, the file has {size}; it may be cut short")
    return tensors


def _entry(file: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    def whole(values: object) -> bool:
        return (isinstance(values, list) and len(values) <= _MOST_AXES
                and all(type(v) is int and 0 <= v < 2**63 for v in values))

    if not name.isprintable() or len(name) > _LONGEST_TEXT:
        raise _corrupt(file, f"a tensor name holds unprintable characters, or more than {_LONGEST_TEXT}")
    unsound = _corrupt(file, f"the entry of {name} lacks dtype, shape or data_offsets, or they are out of range")
    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise unsound
    code, shape, offsets = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(code, str) or not code.isprintable() or len(code) > _LONGEST_TEXT:
        raise unsound
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise unsound
    if code in DTYPES:
        needed = math.prod(shape) * DTYPES[code].itemsize
        if offsets[1] - offsets[0] != needed:
            found = offsets[1] - offsets[0]
            raise _corrupt(file, f"{name} has {found} bytes where {code} {list(shape)} needs {needed}")
    return code, shape, offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(f"{file} is not a sound safetensors file: {what}")


def plan_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The leading bytes of a file that holds `tensors` in this order, and each tensor's offset in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes
    lead = len(text).to_bytes(8, "little") + text
    return lead, {name: len(lead) + entry["data_offsets"][0]  # type: ignore[index]
                  for name, entry in entries.items() if name != "__metadata__"}
