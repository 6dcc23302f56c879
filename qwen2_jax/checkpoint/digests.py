"""What every file of a checkpoint was when it was written, and whether it still is.

`digests.json` is written last: {"files": {path: [bytes, SHA-256]}, "metric": number or null, "step": n, "sha256": that
of all the rest}. Orbax and TensorStore check no bytes of arrays: a flipped bit would be restored without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    AnyPath = Path | epath.Path
    """Folders in a bucket are epath's, local ones pathlib's."""

DIGESTS = "digests.json"
TEMPORARY = f"{DIGESTS}.partial"
_BLOCK = 2**20
_THREADS = 8


@dataclass(frozen=True)
class Record:
    """The digests of a step; `metric` is what steps are compared by to keep the best, lower is better."""

    step: int
    files: Mapping[str, tuple[int, str]]
    metric: float | None = None

    def to_bytes(self) -> bytes:
        body = {"files": dict(sorted(self.files.items())), "metric": self.metric, "step": self.step}
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def file_names(folder: AnyPath) -> list[str]:
    """Every file below `folder`, relative to it; without the digests themselves."""
    return sorted(name for name in _walk(folder, "") if name not in (DIGESTS, TEMPORARY))


def _walk(folder: AnyPath, prefix: str) -> Iterator[str]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _walk(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name


def digest_files(folder: AnyPath, names: Sequence[str], *, flush: bool = False) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of files, several at a time, each as a stream; `flush`: they are on the disk then, not only in
    the system's memory. Raises OSError for a file that is not there."""
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="digest") as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name, flush), names), strict=True))


def _digest(file: AnyPath, flush: bool) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if flush and isinstance(file, Path):
            os.fsync(stream.fileno())
    return size, digest.hexdigest()


def write_record(folder: AnyPath, record: Record) -> None:
    """Writes digests.json, whole or not at all, also when the power fails; one that is there is replaced."""
    write_whole(folder / DIGESTS, record.to_bytes(), temporary=folder / TEMPORARY)


def write_whole(file: AnyPath, data: bytes, *, temporary: AnyPath) -> None:
    """Writes a small file that appears under its name only with all of its bytes on the disk."""
    if not isinstance(file, Path) or not isinstance(temporary, Path):
        file.write_bytes(data)      # an object of a bucket appears whole by itself
        return
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    flush_folder(file.parent)


def flush_folder(folder: AnyPath) -> None:
    """Returns when the names in a local folder are on the disk."""
    if isinstance(folder, Path):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def flush_folders(folder: AnyPath) -> None:
    """`flush_folder` for a local folder and all below it."""
    if isinstance(folder, Path):
        for parent, _, _ in os.walk(folder):
            flush_folder(Path(parent))


def has_record(folder: AnyPath) -> bool:
    """Whether a step folder was written to its end."""
    return (folder / DIGESTS).exists()


def read_record(folder: AnyPath) -> Record:
    """The digests of a step. Raises UserError, naming the file, when it is missing or not as it was written."""
    file = folder / DIGESTS
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror or e}") from e
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        body = json.loads(data)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        record = Record(body["step"], files, body["metric"])
        if record.to_bytes() == data:       # to the last byte, its own digest included
            return record
    raise UserError(f"{file} is damaged")


def set_metric(folder: AnyPath, metric: float) -> None:
    """Notes what a step that is complete is compared by. Raises UserError as `read_record` does."""
    write_record(folder, replace(read_record(folder), metric=metric))


def damages(folder: AnyPath, entries: Collection[str] | None = None, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is not as it was written in a step folder, a sentence a file; empty when all is.

    Found are a missing, cut or changed file, digests.json included, and a file that was put among an entry's. `entries`
    are the folders looked at (params, optimizer, …) beside the files of the step itself, by default all of them;
    `share` = (i, n) reads the i-th of n shares.
    """
    if not has_record(folder):
        return [f"{DIGESTS} is missing"]
    try:
        record = read_record(folder)
    except UserError as e:
        return [str(e).removeprefix(f"{folder}/")]
    if folder.name.isdecimal() and folder.name != str(record.step):
        return [f"{DIGESTS} is of step {record.step}"]

    def looked_at(name: str) -> bool:
        entry, slash, _ = name.partition("/")
        return entries is None or not slash or entry in entries

    wanted = sorted(filter(looked_at, record.files), key=lambda name: (record.files[name][0], name), reverse=True)
    theirs = {name.partition("/")[0] for name in record.files if "/" in name}
    found = [f"{name} was not there when it was written" for name in file_names(folder)
             if looked_at(name) and name not in record.files and name.partition("/")[0] in theirs]
    first, count = share
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="verify") as pool:
        return found + [text for text in pool.map(lambda name: _damage(folder / name, name, record.files[name]),
                                                  wanted[first::count]) if text]


def _damage(file: AnyPath, name: str, expected: tuple[int, str]) -> str | None:
    if not file.exists():
        return f"{name} is missing"
    try:
        size, digest = _digest(file, flush=False)
    except OSError as e:
        return f"{name} cannot be read ({e.strerror or e})"
    if size != expected[0]:
        return f"{name} has {size:,} bytes, {expected[0]:,} were written"
    return None if digest == expected[1] else f"{name} is not what was written (its SHA-256 differs)"
