"""A folder that appears whole or not at all: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def staged(dst: Path, *, needed: int = 0) -> Iterator[Path]:
    """Yields `DST.partial-<pid>`; renames it to `dst` when the body ends well, removes it on any exception.

    SIGTERM counts as an exception (SystemExit 143) while the body runs, so a stopped job leaves nothing behind; after
    SIGKILL only the temporary name stays. Raises UserError when `dst` exists, its parent cannot be written, fewer than
    `needed` bytes are free, or the disk fills up.
    """
    if os.path.lexists(dst):
        raise UserError(f"{dst} already exists: choose another destination or remove it first")
    partial = dst.parent / f"{dst.name}.partial-{os.getpid()}"
    with naming_disk_errors(dst), _terminate_raises():
        dst.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.parent).free
        if free < needed:
            raise _disk_error(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", dst)
        if partial.exists():  # a killed run had our process id
            shutil.rmtree(partial)
        for left in dst.parent.glob(f"{glob.escape(dst.name)}.partial-*"):
            log.warning("%s is there: of a run still writing, or of one that was killed; then remove it", left)
        partial.mkdir()
        try:
            yield partial
            _flush(partial)
            if os.path.lexists(dst):
                raise UserError(f"{dst} appeared while it was being written: nothing was changed there")
            partial.rename(dst)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _flush_folder(dst.parent)


@contextlib.contextmanager
def naming_disk_errors(dst: Any, *, needed: int = 0) -> Iterator[None]:
    """Turns the system's refusals while `dst` is written into UserErrors, whichever library reports them; `needed`
    bytes are then named beside those that are free."""
    try:
        yield
    except OSError as e:
        raise _disk_error(e.errno, e.strerror or str(e), dst, needed) from e
    except (ValueError, RuntimeError) as e:  # TensorStore reports the system's errors as text
        for code in (*_FULL, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
            if os.strerror(code) in str(e):
                raise _disk_error(code, os.strerror(code), dst, needed) from e
        raise


def _disk_error(code: int | None, text: str, dst: Any, needed: int = 0) -> UserError:
    if code in _FULL:
        if needed and isinstance(dst, Path):
            text += f"; {needed:,} bytes are needed, {shutil.disk_usage(dst.parent).free:,} are free now"
        return UserError(f"no space left on the disk of {dst}: free some or choose another destination ({text})")
    return UserError(f"cannot write {dst}: {text}")


@contextlib.contextmanager
def _terminate_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        _flush_folder(Path(parent))


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
