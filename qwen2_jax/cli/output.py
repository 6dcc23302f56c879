"""Files that a command writes: under a temporary name, renamed when complete, never half there."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qwen2_jax.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file that appears at `path` only when the block ends well; whatever was there stays until then.

    Raises:
      UserError: `path` cannot be written; said before the block starts.
    """
    path, stream = _open(path, mode)
    try:
        yield stream
    except BaseException as error:
        _discard(path, stream)
        _raise_if_full(path, error)
        raise
    _publish(path, stream)


def check_writable(path: str | Path) -> None:
    """Raises UserError where `whole_file` would: for those who work long before they write. Leaves nothing behind."""
    resolved = Path(os.path.realpath(path))
    if resolved.is_dir() or not _is_special(resolved):      # a pipe's reader would take this for the end
        _discard(*_open(path, "w"))


@contextlib.contextmanager
def records(path: str | Path | None) -> Iterator[IO[str]]:
    """Opens a file of one record a line that keeps finished lines whatever happens; None or `-` is stdout.

    When the block ends well the file appears at `path`. When it is interrupted or fails, the finished lines still do;
    but a file that was there before is kept then, and the lines go to `path.partial` beside it.

    Raises:
      UserError: `path` cannot be written; said before the block starts.
    """
    if path is None or str(path) == "-":
        try:
            yield sys.stdout
        finally:
            sys.stdout.flush()
        return
    path, stream = _open(path, "w")
    try:
        yield stream
    except BaseException as error:
        _keep_finished(path, stream)
        _raise_if_full(path, error)
        raise
    _publish(path, stream)


def _open(path: str | Path, mode: str) -> tuple[Path, IO]:
    path = Path(os.path.realpath(path))     # through a symbolic link, so that the link stays one
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    # A pipe or a device is written as it is: renaming over /dev/null would replace it.
    name = path if _is_special(path) else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "it is write-protected")
        encoding = None if "b" in mode else "utf-8"
        return path, open(name, mode, encoding=encoding, errors=encoding and "replace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _discard(path: Path, stream: IO) -> None:
    with contextlib.suppress(OSError):      # a full disk fails once more when it closes
        stream.close()
    if not _is_special(path):
        Path(stream.name).unlink(missing_ok=True)


def _raise_if_full(path: Path, error: BaseException) -> None:
    """Gives a failed write, which carries no file name, the name of the file that it must have been."""
    if isinstance(error, OSError) and error.errno in NO_SPACE and error.filename is None:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _publish(path: Path, stream: IO) -> None:
    try:
        stream.flush()
        if not _is_special(path):
            os.fsync(stream.fileno())
        stream.close()
        if not _is_special(path):
            os.replace(stream.name, path)
    except OSError as error:
        _discard(path, stream)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _keep_finished(path: Path, stream: IO) -> None:
    with contextlib.suppress(OSError):
        stream.flush()
    if _is_special(path):
        return _discard(path, stream)
    finished = Path(stream.name).read_bytes().rpartition(b"\n")[0]
    if not finished:
        return _discard(path, stream)
    destination = path.with_name(f"{path.name}.partial") if path.exists() else path
    os.truncate(stream.name, len(finished) + 1)
    with contextlib.suppress(OSError):
        stream.close()
    os.replace(stream.name, destination)
    lines = finished.count(b"\n") + 1
    print(f"qwen2-jax: {lines} finished record{'s' * (lines > 1)} kept in {destination}", file=sys.stderr)
