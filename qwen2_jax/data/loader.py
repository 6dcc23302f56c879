"""Batches of a stream from a step on, made ahead of the step that takes them.

Grain reads batch numbers as it would read records, in a thread that stays a few ahead; worker processes are ours
(`workers.py`). Grain's own (`mp_prefetch`, 0.2.18) import JAX, which takes a second and 210 MB each, refuse to start
where absl's flags were not parsed, and wait up to 25 s each for one another at the end when a batch is larger than a
pipe holds.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import util
from typing import Any

from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.data.stream import Stream
from qwen2_jax.data.workers import ordered
from qwen2_jax.errors import UserError

AHEAD = 2
"""Batches that are ready beside those in the workers' hands."""


class Loader:
    """Iterates over batches `start`, `start` + 1, … of a stream, without end; of each over the given rows alone.

    They are made in a thread, with 2 workers or more in so many processes, which start at once, ignore Ctrl-C and
    SIGTERM, and end with `close`, the end of a `with` block, or this process, however it ends. The thread alone gives
    millions of tokens a second; workers are for storage that answers slowly.

    What goes wrong while a batch is made is raised where it would have been returned, and from then on.
    """

    def __init__(self, stream: Stream, start: int = 0, *, rows: slice = slice(None), workers: int = 0):
        if workers < 0:
            raise UserError(f"the number of data workers must be 0 or more, found {workers}")
        # Here, because it imports JAX, and workers import this file.
        import grain.python as grain

        make = partial(partial, stream.batch, rows=rows)
        self._batches = _Batches(ordered(make, range(start, sys.maxsize), max(workers, 1)))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        self._iterator = iter(grain.MapDataset.source(self._batches).to_iter_dataset(options))
        self._iterator.start_prefetch()
        self._error: Exception | None = None
        # At exit `multiprocessing` ends daemons by SIGTERM and waits for them, those that ignore it for ever.
        self._at_exit = util.Finalize(self, _close, (self._iterator, self._batches), exitpriority=1)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        if self._error is None:
            try:
                return next(self._iterator)
            except Exception as error:
                self._error = error
        raise self._error

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and the workers; nothing can be read afterwards."""
        self._at_exit()


def _close(iterator: Any, batches: _Batches) -> None:
    iterator.close()
    batches.close()


class _Batches:
    """Batches in order as Grain reads them: one after the other, from one thread."""

    def __init__(self, batches: Iterator[PackedBatch]):
        self._batches, self._lock = batches, threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> PackedBatch:
        with self._lock:
            return next(self._batches)

    def close(self) -> None:
        with self._lock:    # a generator cannot be closed while it runs
            self._batches.close()       # pyright: ignore[reportAttributeAccessIssue]
