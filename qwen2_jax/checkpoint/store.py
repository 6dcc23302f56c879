"""Checkpoints of a training run: saved by Orbax while training goes on, digested, committed, verified before reading.

Layout: `path/{step}/params/`, `path/{step}/optimizer/`, … one Orbax checkpoint for each entry of the state,
`path/{step}/about/`, JSON that the caller hands in, and `path/{step}/digests.json`, written last. A step folder is a
checkpoint that `open_checkpoint` reads, with the config.json that lies in it or in `path`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from qwen2_jax.checkpoint import digests, fault, orbax_step, step_folders
from qwen2_jax.checkpoint.digests import Record
from qwen2_jax.checkpoint.staging import naming_disk_errors
from qwen2_jax.checkpoint.step_folders import DamagedCheckpoint
from qwen2_jax.checkpoint.together import Together
from qwen2_jax.errors import UserError
from qwen2_jax.ops.quant import refuse_quantized
from qwen2_jax.sharding import distributed

if TYPE_CHECKING:
    from qwen2_jax.checkpoint.digests import AnyPath

log = logging.getLogger(__name__)

_QUIET = 0.5
"""Seconds without a new file after which nothing is taken to be written any more of a step that failed."""


class Store:
    """Checkpoints of one training run. Saving goes on while training does; each process of a program makes the same
    calls. One thread uses a Store.

    Args:
      path: the run's folder, made when it is missing; "gs://…", or an epath.Path, for a bucket.
      keep: how many of the newest steps stay.
      keep_every: multiples of it stay for ever.
      keep_best: how many of those with the lowest metric stay. Step 0 stays too, if it was saved.
      read_only: nothing is made, cleaned or written; also for folders that another run writes to.

    Raises UserError when the folder cannot be written, holds checkpoints that are not ours, or is written to by another
    run. What a killed run has left half done is removed.
    """

    def __init__(self, path: str | AnyPath, *, keep: int = 3, keep_every: int | None = None, keep_best: int = 0,
                 read_only: bool = False):
        if keep < 1 or keep_best < 0 or (keep_every is not None and keep_every < 1):
            raise UserError("keep must be at least 1, keep_every at least 1 or none, keep_best at least 0: found "
                            f"{keep}, {keep_every}, {keep_best}")
        remote = isinstance(path, epath.Path) or "://" in str(path)
        self.path: AnyPath = epath.Path(path) if remote else Path(path).expanduser().absolute()
        self.read_only = read_only
        self._policy = {"last": keep, "every": keep_every, "best": keep_best}
        self._processes = Together()
        self._background: threading.Thread | None = None
        self._error: BaseException | None = None
        self._metrics: dict[int, float] = {}    # of steps that are being saved
        self._mine: set[int] = set()
        self._lock = threading.Lock()           # digests.json is replaced here and in the background
        self._checkpointer = orbax_step.checkpointer(self.path)
        self._unlock: Callable[[], Any] = lambda: None
        self._newest = self._processes.first("opening", self._open)

    def _open(self) -> int:
        """The newest step there, -1 without one."""
        if not self.read_only:
            try:
                step_folders.check_ours(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
                self._unlock = step_folders.lock(self.path, self)
                step_folders.clean(self.path)
            except OSError as e:
                raise UserError(f"cannot write checkpoints to {self.path}: {e.strerror or e}") from e
        return max(step_folders.step_folders(self.path), default=-1)

    def save(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any], *, metric: float | None = None
             ) -> bool:
        """Starts to save step `step`, above all that are there; False when this Store has saved it already.

        `state` is {"params": tree, "optimizer": tree, …} of arrays, which may be donated to the next step as soon as
        this returns; `about` is JSON: position of the data, configuration, versions, whatever going on needs; `metric`
        as for `set_metric`. Once all is on disk, in the background, digests.json is written, "checkpoint N committed"
        is logged, and steps that are not kept are removed. A step whose saving is killed before that does not count.

        Raises UserError when the disk is full, for this step or the one before, whose writing ends here (the steps
        before are as they were, nothing is left of this one); for a quantized tree; for a step below another one.
        """
        refuse_quantized(state, f"{self.path}: a checkpoint")
        if self.read_only:
            raise UserError(f"{self.path} was opened for reading only: nothing is saved there")
        if step < 0:
            raise ValueError(f"step {step} is negative")
        self.wait()
        if step in self._mine:
            return False
        if step <= self._newest:
            raise UserError(f"{self.path} holds step {self._newest}, so step {step} cannot be saved after it: discard "
                            "the steps from there on first, or choose another folder")
        needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(state)))
        if metric is not None:
            self._metrics[step] = float(metric)
        with self._cleaning_up(step, needed):
            if distributed.is_first():
                step_folders.mark_saving(self.path, step)
            self._checkpointer.save(self.path / str(step), args=orbax_step.save_args(state, about))
        self._background = threading.Thread(target=self._finish, args=(step, self._newest, needed), name="save")
        self._mine.add(step)
        self._newest = step
        self._background.start()
        return True

    def _finish(self, step: int, newest: int, needed: int) -> None:
        """What follows in the background once `save` has returned."""
        folder = self.path / str(step)
        try:
            with self._cleaning_up(step, needed):
                self._checkpointer.wait_until_finished()
                names = self._processes.first("files", lambda: digests.file_names(folder))
                found = self._processes.each(
                    "digests", lambda share: digests.digest_files(folder, names[share], flush=True))
                self._processes.first("commit", lambda: self._commit(step, found))
            if distributed.is_first():
                self._retire()
        except BaseException as e:      # raised again in the thread that trains
            self._mine.discard(step)
            self._newest = newest
            self._error = e

    def _commit(self, step: int, files: dict[str, tuple[int, str]]) -> None:
        folder = self.path / str(step)
        digests.flush_folders(folder)
        digests.flush_folder(self.path)
        fault.reach("before_digest")
        with self._lock:
            digests.write_record(folder, Record(step, files, self._metrics.pop(step, None)))
        fault.reach("after_digest")
        step_folders.unmark_saving(self.path, step)
        log.info("checkpoint %d committed: %d bytes in %s", step, sum(size for size, _ in files.values()), folder)

    def _retire(self) -> None:
        """Removes what is not kept. The run does not end because an old step cannot be removed."""
        try:
            there = {step: record.metric for step, record in step_folders.records(self.path).items()}
            for step in sorted(there.keys() - step_folders.kept(there, **self._policy)):
                with self._lock:
                    step_folders.remove_step(self.path, step)
        except OSError as e:
            log.warning("%s: an old checkpoint cannot be removed: %s", self.path, e)

    @contextlib.contextmanager
    def _cleaning_up(self, step: int, needed: int) -> Iterator[None]:
        """A step that cannot be saved leaves nothing, and the disk's refusals are told as such."""
        with naming_disk_errors(self.path / str(step), needed=needed):
            try:
                yield
            except BaseException:
                self._metrics.pop(step, None)
                if distributed.is_first() and not digests.has_record(self.path / str(step)):
                    orbax_step.wait_for_writers(_QUIET)
                    with contextlib.suppress(OSError):      # then the next opening removes it
                        step_folders.remove_unfinished(self.path, step, quiet=_QUIET)
                raise

    def set_metric(self, step: int, metric: float) -> None:
        """Notes what `step` is compared by when the best are kept: lower is better. A step that is not there is passed
        over."""
        if not distributed.is_first():
            return
        folder = self.path / str(step)
        with self._lock:
            if digests.has_record(folder):
                with naming_disk_errors(folder):
                    digests.set_metric(folder, float(metric))
            elif step in self._mine:
                self._metrics[step] = float(metric)

    def discard_after(self, step: int) -> list[int]:
        """Removes all steps above `step`, for a run that goes on from there; returns them."""
        self.wait()

        def discard() -> list[int]:
            above = [s for s in step_folders.step_folders(self.path) if s > step]
            for s in reversed(above):
                log.warning("checkpoint %d is removed: the run goes on from %d", s, step)
                with naming_disk_errors(self.path / str(s)):
                    step_folders.remove_step(self.path, s)
            return above

        gone = self._processes.first("discarding", discard)
        self._mine -= set(gone)
        self._newest = min(self._newest, step)
        return gone

    def restore(self, like: Mapping[str, Any], step: int | None = None, *, verify: bool = True
                ) -> tuple[dict[str, Any], dict[str, Any]]:
        """State and `about` of a step, by default the newest.

        `like` mirrors the entries wanted (`params` alone is fine, and {} for `about` only) in `jax.ShapeDtypeStruct`s
        with shardings: any mesh will do, whatever mesh the state was saved from. Every file of these entries is
        compared with its digest before anything is read; `verify=False` reads a step as it is, also one without any.

        Raises DamagedCheckpoint, a UserError that names the file and the newest step that is whole; UserError when
        there is no such step, or when what was saved has other names or shapes.
        """
        self.wait()
        chosen: int = self._processes.first("step to restore", lambda: self._choose(step))
        folder = self.path / str(chosen)
        if verify:
            self._refuse_damage(chosen, {*like, orbax_step.ABOUT})
        try:
            return orbax_step.read(self._checkpointer, folder, like)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            if verify:
                raise
            raise UserError(f"checkpoint {folder} cannot be read: {(str(e).splitlines() or [repr(e)])[0]}") from e

    def _choose(self, step: int | None) -> int:
        there = step_folders.step_folders(self.path)
        if not there:
            raise UserError(f"{self.path} holds no checkpoint")
        if step is not None and step not in there:
            raise UserError(f"{self.path} holds no checkpoint of step {step}; it has {', '.join(map(str, there))}")
        return there[-1] if step is None else step

    def _refuse_damage(self, step: int, entries: Collection[str]) -> None:
        found = self._damages(step, entries)
        if found:
            others = self._processes.first("other steps", lambda: step_folders.committed_steps(self.path))
            good = next((s for s in reversed(others) if s != step and not self._damages(s)), None)
            raise DamagedCheckpoint(self.path / str(step), found, good)

    def _damages(self, step: int, entries: Collection[str] | None = None) -> list[str]:
        return list(self._processes.each("damages", lambda share: dict.fromkeys(
            digests.damages(self.path / str(step), entries, share=(share.start, share.step)))))

    def steps(self) -> list[int]:
        """Steps that are committed, in order; digests are not compared."""
        return step_folders.committed_steps(self.path)

    def latest_step(self) -> int | None:
        """The last step that is committed, None when there is none."""
        return max(self.steps(), default=None)

    def newest_good(self) -> int | None:
        """The newest step whose files all are as they were written, None when there is none. Reads them."""
        self.wait()
        steps = self._processes.first("steps", self.steps)
        return next((step for step in reversed(steps) if not self._damages(step)), None)

    def check(self) -> None:
        """Raises what has gone wrong in the background, if anything has; waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when what is being saved is committed; raises what went wrong meanwhile."""
        if self._background is not None:
            self._background.join()
            self._background = None
        self.check()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads and of the folder."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._unlock()
