"""The step folders of a training run on disk, and what a killed run leaves of them.

`STEP/` with its digests.json is a committed checkpoint. `STEP.saving` is a file that is there from before anything of
the step is written until after its digests are; `STEP.removing` is what a step folder is renamed to before it is
deleted (in a bucket, where folders have no names to change, a mark beside it). What such a name says is unfinished is
removed when the run's folder is next opened for writing; nothing else ever is, however it looks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.checkpoint import fault
from qwen2_jax.checkpoint.digests import (
    DIGESTS,
    TEMPORARY,
    Record,
    damages,
    flush_folder,
    has_record,
    read_record,
    write_whole,
)
from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.checkpoint.digests import AnyPath

log = logging.getLogger(__name__)

SAVING, REMOVING = "saving", "removing"
_LEFT = re.compile(rf"(\d+)\.({SAVING}|{REMOVING}|{SAVING}\.partial|orbax-checkpoint-tmp.*)")
_PATIENCE = 5.0
"""Seconds for which something may still be written into a folder that is to go away."""


def step_folders(path: AnyPath) -> list[int]:
    """Steps with a folder, whether committed or not, in order; not those being saved or removed."""
    if not path.is_dir():
        return []
    names = {child.name for child in path.iterdir()}
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name) and (path / name).is_dir()
                  and f"{name}.{REMOVING}" not in names
                  and (f"{name}.{SAVING}" not in names or has_record(path / name)))


def committed_steps(path: AnyPath) -> list[int]:
    """Steps that were written to their end, in order."""
    return [step for step in step_folders(path) if has_record(path / str(step))]


def newest_good(path: AnyPath, *, without: int | None = None) -> int | None:
    """The newest committed step whose files all are as they were written; reads them."""
    return next((step for step in reversed(committed_steps(path))
                 if step != without and not damages(path / str(step))), None)


def newest_step(path: AnyPath) -> int | None:
    """The newest step of a run's folder, to be read; None where there is none. Of steps without digests, as versions
    before them wrote, the newest only where no step has any. Raises DamagedCheckpoint when the newest has lost its."""
    there = step_folders(path)
    if not there or has_record(path / str(there[-1])) or not committed_steps(path):
        return there[-1] if there else None
    raise DamagedCheckpoint(path / str(there[-1]), damages(path / str(there[-1])), newest_good(path))


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not as they were written: `damages` says how, `good` is a step that is whole."""

    def __init__(self, folder: AnyPath, found: list[str], good: int | None):
        self.step = int(folder.name) if folder.name.isdecimal() else None
        self.damages, self.good = found, good
        more = f" (and {len(found) - 1} more: {'; '.join(found[1:4])}{'; …' if len(found) > 4 else ''})"
        offer = ("no other checkpoint beside it is whole" if good is None else
                 f"the newest checkpoint that is whole is step {good}: go on from {folder.parent / str(good)}")
        super().__init__(f"checkpoint {folder} is damaged: {found[0]}{more if len(found) > 1 else ''}; nothing was "
                         f"read from it; {offer}")


def check_whole(folder: AnyPath, entries: tuple[str, ...], *, share: tuple[int, int] = (0, 1)) -> None:
    """Raises DamagedCheckpoint when a step folder with digests is not as it was written; see `digests.damages`."""
    if has_record(folder) and (found := damages(folder, entries, share=share)):
        step = int(folder.name) if folder.name.isdecimal() else None
        raise DamagedCheckpoint(folder, found, newest_good(folder.parent, without=step))


def mark_saving(path: AnyPath, step: int) -> None:
    """From now on, until `unmark_saving`, the step folder is unfinished while it has no digests."""
    write_whole(path / f"{step}.{SAVING}", f"Checkpoint {step} is being saved. If no run is writing here, it was killed"
                f" meanwhile; the next one removes this.\n".encode(), temporary=path / f"{step}.{SAVING}.partial")


def unmark_saving(path: AnyPath, step: int) -> None:
    (path / f"{step}.{SAVING}").unlink(missing_ok=True)


def remove_step(path: AnyPath, step: int) -> None:
    """Deletes a step, so that a kill meanwhile leaves a name that says so. Raises OSError."""
    folder, doomed = path / str(step), path / f"{step}.{REMOVING}"
    if not isinstance(folder, Path):
        doomed.write_bytes(b"")
        _remove_tree(folder)
        doomed.unlink()
        return
    folder.rename(doomed)
    flush_folder(path)
    (doomed / DIGESTS).unlink(missing_ok=True)
    fault.reach("during_retention")
    _remove_tree(doomed)


def remove_unfinished(path: AnyPath, step: int, *, quiet: float = 0.0) -> None:
    """Deletes what there is of a step whose saving failed, again and again until nothing has come back for `quiet`
    seconds: writes that are still under way make their folders anew. Raises OSError, and the mark stays, when it
    cannot."""
    end = time.monotonic() + _PATIENCE
    calm = time.monotonic() + quiet
    while True:
        for left in [path / str(step), *path.glob(f"{step}.orbax-checkpoint-tmp*")]:
            if left.exists():
                _remove_tree(left)
                calm = time.monotonic() + quiet
        if time.monotonic() >= min(calm, end):
            break
        time.sleep(quiet / 10)
    unmark_saving(path, step)


def clean(path: AnyPath) -> None:
    """Removes what killed runs have left: steps half saved, half removed, and temporary files. Raises OSError."""
    for child in list(path.iterdir()):
        if child.name.isdecimal() and child.is_dir():
            (child / TEMPORARY).unlink(missing_ok=True)
        if not (match := _LEFT.fullmatch(child.name)):
            continue
        step, what = int(match[1]), match[2]
        if what == SAVING and not has_record(path / str(step)):
            log.info("%s: the unfinished checkpoint %d of a killed run is removed", path, step)
            remove_unfinished(path, step)
        elif what == REMOVING and not child.is_dir():
            _remove_tree(path / str(step))
        if child.exists():
            _remove_tree(child) if child.is_dir() else child.unlink()


def check_ours(path: AnyPath) -> None:
    """Raises UserError when the folder holds steps and none has digests: another version or program wrote them."""
    found = step_folders(path)
    if found and not committed_steps(path):
        raise UserError(f"{path} holds checkpoints without {DIGESTS} (the last of step {found[-1]}), as versions "
                        "before it or other programs write them: nothing was changed, and nothing is written there; "
                        "choose another folder for this run (such a checkpoint can be read, unverified: "
                        "Store(path, read_only=True).restore(…, verify=False))")


def lock(path: AnyPath, owner: object) -> Callable[[], Any]:
    """Keeps others from writing to the run's folder until the function returned is called, or `owner` is gone, or this
    process, however it ends.

    Raises UserError when one does now. File systems that know no locks have none.
    """
    if not isinstance(path, Path):
        return lambda: None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise UserError(f"another run is writing checkpoints to {path}: wait for its end, or choose another "
                            "folder") from e
        return lambda: None
    return weakref.finalize(owner, os.close, fd)


def records(path: AnyPath) -> dict[int, Record]:
    """The digests of all committed steps but those that are damaged."""
    found = {}
    for step in committed_steps(path):
        with contextlib.suppress(UserError):
            found[step] = read_record(path / str(step))
    return found


def kept(metrics: Mapping[int, float | None], *, last: int, every: int | None, best: int) -> set[int]:
    """Which of the steps in `metrics` stay: the `last` newest, multiples of `every`, the `best` with the lowest metric
    (of equal ones the newest), and step 0, from which a run can be told again."""
    newest = sorted(metrics)[-last:]
    compared = {step: value for step, value in metrics.items() if value is not None and math.isfinite(value)}
    lowest = sorted(compared, key=lambda step: (compared[step], -step))[:best]
    return {*newest, *lowest, *(step for step in metrics if step == 0 or (every and step % every == 0))}


def _remove_tree(folder: AnyPath) -> None:
    """Deletes a folder, if there is one, with all that is in it, waiting for a little while for those who still write
    into it."""
    end = time.monotonic() + _PATIENCE
    while folder.exists():
        try:
            shutil.rmtree(folder) if isinstance(folder, Path) else folder.rmtree()
        except FileNotFoundError:
            continue
        except OSError as e:
            if e.errno != errno.ENOTEMPTY or time.monotonic() > end:
                raise
            time.sleep(0.05)
