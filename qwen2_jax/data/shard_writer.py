"""Writes shards so that a run killed at any instant goes on where it stopped, to the same bytes.

Beside the shards lies `progress.jsonl`. A run's first line says what is being prepared. Then comes a line for each task
whose tokens have been appended: where the next task starts, how long the open shard is, and its checksums; and a line
for each shard that is complete. What was appended after the last whole line is cut off when the run goes on. Nobody
takes the folder for complete: `manifest.json` is written last, and then the progress goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.data.rows import BadRow
from qwen2_jax.data.shards import FORMAT, HEADER, LENGTHS, MANIFEST, PROGRESS, file_sha256, token_dtype
from qwen2_jax.data.sources import START, Position
from qwen2_jax.errors import UserError

SKIPPED = "skipped.jsonl"


class ShardWriter:
    """The folder of a run, new or one that goes on; locked, so that two runs never write into one.

    Attributes:
      identity: what the folder's earlier run prepared, None in a new folder.
      position: where the next task starts.
      skipped: the bad rows so far.
      documents, tokens: how many have been written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.identity: dict[str, Any] | None = None
        self.position: Position = START
        self.skipped: list[BadRow] = []
        self.documents = self.tokens = 0
        self._shards: list[dict[str, Any]] = []
        self._open: tuple[_Array, _Array] | None = None
        self._waiting: list[tuple[int, dict[str, Any]]] = []    # lines of the open shard, and where they end
        with naming_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._progress = os.open(folder / PROGRESS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._lock()
            self._read_progress()

    def begin(self, identity: dict[str, Any], shard_tokens: int) -> None:
        """Takes up the work on `identity`, which the caller has compared with the earlier one."""
        self._dtype, self._shard_tokens = token_dtype(identity["vocab"]), shard_tokens
        with naming_errors(self._folder):
            self._take_up()
            self._note({"identity": identity})
            self.identity = identity

    def append(self, tokens: np.ndarray, lengths: np.ndarray, skipped: Sequence[BadRow], position: Position) -> None:
        """Adds a task's documents; when this returns, a kill does not lose them."""
        with naming_errors(self._folder):
            if len(lengths):
                token_file, length_file = self._open = self._open or self._shard_files()
                token_file.append(tokens)
                length_file.append(lengths)
            rows = [[row.file, row.row, row.reason] for row in skipped]
            entry = {"next": position, "bad": rows}
            if self._open:
                entry["files"] = [[array.length, array.checksum] for array in self._open]
            self._note(entry)
            self._count(entry, len(tokens), len(lengths))
            if self._open and self._open[0].length >= self._shard_tokens:
                self._complete_shard()

    def finish(self) -> dict[str, Any]:
        """Writes the manifest, which makes the folder complete, and returns it."""
        assert self.identity is not None
        with naming_errors(self._folder):
            if self._open:
                self._complete_shard()
            if not self._shards:
                raise UserError(f"the sources hold no document; {len(self.skipped)} bad rows were skipped")
            if self.skipped:
                lines = (json.dumps(vars(row)) + "\n" for row in self.skipped)
                self._write_whole(SKIPPED, "".join(lines))
            manifest = {"format": FORMAT, "documents": self.documents, "tokens": self.tokens,
                        "skipped": len(self.skipped), "dtype": self._dtype.name, **self.identity,
                        "shards": self._shards}
            self._write_whole(MANIFEST, json.dumps(manifest, indent=1) + "\n")
            os.unlink(self._folder / PROGRESS)
        return manifest

    def close(self) -> None:
        for array in self._open or ():
            array.close()
        os.close(self._progress)    # and the lock with it

    def _lock(self) -> None:
        try:
            fcntl.flock(self._progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._progress)
            raise UserError(f"another run is writing into {self._folder}: wait, or choose another --out") from None

    def _read_progress(self) -> None:
        with open(self._folder / PROGRESS, "rb") as stream:
            lines = stream.read().splitlines(keepends=True)
        end = kept = 0
        for line in lines:
            end += len(line)
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:      # the machine went down, not only the run
                entry = None
            if entry is None:
                break
            if "identity" in entry:
                self.identity = entry["identity"]
                if self._waiting:
                    continue
            elif "shard" in entry:
                for _, waiting in self._waiting:
                    self._count(waiting, 0, 0)
                self._waiting.clear()
                self._shards.append(entry["shard"])
                self.tokens += entry["shard"]["tokens"]
                self.documents += entry["shard"]["documents"]
            else:
                self._waiting.append((end, entry))
                continue
            kept = end
        self._kept = kept

    def _take_up(self) -> None:
        """Compares the open shard with its lines, and goes back to the last one that is true."""
        arrays = self._shard_files() if any("files" in entry for _, entry in self._waiting) else None
        for end, entry in self._waiting:
            grown = [0, 0]
            if "files" in entry:
                assert arrays is not None
                before = [array.length for array in arrays]
                if not all(array.matches(*state) for array, state in zip(arrays, entry["files"], strict=True)):
                    break
                grown = [array.length - length for array, length in zip(arrays, before, strict=True)]
            self._count(entry, *grown)
            self._kept = end
        if arrays is not None and arrays[0].length:
            self._open = arrays
        else:
            for array in arrays or ():
                array.close()
        os.ftruncate(self._progress, self._kept)
        if self._open and self._open[0].length >= self._shard_tokens:    # stopped between its last line and its own
            self._complete_shard()

    def _count(self, entry: dict[str, Any], tokens: int, documents: int) -> None:
        file, row, offset = entry["next"]
        self.position = (file, row, offset)
        self.skipped += (BadRow(*row) for row in entry["bad"])
        self.tokens += tokens
        self.documents += documents

    def _shard_files(self) -> tuple[_Array, _Array]:
        name = f"shard-{len(self._shards):05d}"
        return _Array(self._folder / f"{name}.npy", self._dtype), _Array(self._folder / f"{name}.lengths.npy", LENGTHS)

    def _complete_shard(self) -> None:
        assert self._open is not None
        tokens, lengths = self._open
        for array in self._open:
            array.complete()
        self._shards.append({"file": tokens.path.name, "documents": lengths.length, "tokens": tokens.length,
                             "sha256": file_sha256(tokens.path), "lengths_file": lengths.path.name,
                             "lengths_sha256": file_sha256(lengths.path)})
        self._note({"shard": self._shards[-1]})
        os.fsync(self._progress)
        self._open = None

    def _note(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        _write(self._progress, line)

    def _write_whole(self, name: str, text: str) -> None:
        temporary = self._folder / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self._folder / name)


class _Array:
    """A file of numbers in numpy's format that grows at its end. Its header is written when it is complete."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self._dtype = path, dtype
        self.length = self.checksum = 0
        self._stream = open(path, "r+b" if path.exists() else "w+b", buffering=0)   # closing it twice does nothing
        self._file = self._stream.fileno()

    def append(self, array: np.ndarray) -> None:
        data = array.astype(self._dtype, copy=False).tobytes()
        os.lseek(self._file, self._end(), os.SEEK_SET)
        _write(self._file, data)
        self.length += len(array)
        self.checksum = zlib.crc32(data, self.checksum)

    def matches(self, length: int, checksum: int) -> bool:
        """Whether the file goes on to `length` numbers that give `checksum`; then those count as appended."""
        data = os.pread(self._file, (length - self.length) * self._dtype.itemsize, self._end())
        if len(data) != (length - self.length) * self._dtype.itemsize or zlib.crc32(data, self.checksum) != checksum:
            return False
        self.length, self.checksum = length, checksum
        return True

    def complete(self) -> None:
        os.ftruncate(self._file, self._end())       # of what was appended and never noted
        os.lseek(self._file, 0, os.SEEK_SET)
        _write(self._file, header(self._dtype, self.length))
        os.fsync(self._file)
        self.close()

    def close(self) -> None:
        self._stream.close()

    def _end(self) -> int:
        return HEADER + self.length * self._dtype.itemsize


def header(dtype: np.dtype, length: int) -> bytes:
    """What stands in front of `length` numbers in a .npy file."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, fields)
    assert stream.tell() == HEADER
    return stream.getvalue()


@contextlib.contextmanager
def naming_errors(folder: Path) -> Iterator[None]:
    """Turns the system's refusals to write into a UserError."""
    try:
        yield
    except OSError as error:
        full = "; free some space: the same command goes on" * (error.errno in (errno.ENOSPC, errno.EDQUOT))
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}{full}") from None


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
