"""SIGTERM: the machine will be taken away, and what was trained must be on the disk before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from jax.experimental import multihost_utils

from qwen2_jax.sharding import distributed


class Preemption:
    """While the block runs, SIGTERM asks for an end after the step at hand: of all processes after the same one,
    whoever got it. Before the first step there is nothing to save: then `leave` is called at once, also while the
    compiler or another library has the main thread, and the process ends with the status that it returns.

    With several processes the signal is JAX's runtime's, and an end comes after the first step at the earliest.
    """

    def __init__(self, leave: Callable[[], int]):
        self._leave, self._asked, self._begun = leave, False, False
        self._before: list[Any] = []

    def __enter__(self) -> Preemption:
        if distributed.count() == 1 and threading.current_thread() is threading.main_thread():
            heard, told = os.pipe()
            os.set_blocking(told, False)
            self._before = [signal.signal(signal.SIGTERM, self._ask), signal.set_wakeup_fd(told), told, heard]
            self._watch = threading.Thread(target=self._watch_early, args=(heard,), name="sigterm", daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            handler, wakeup, told, heard = self._before
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)
            os.close(told)      # ends the thread
            self._watch.join()
            os.close(heard)

    def reached(self, step: int) -> bool:
        """Whether the run ends after this step, the first of which has been compiled by now."""
        self._begun = True
        return self._asked if distributed.count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, signum, frame) -> None:
        self._asked = True

    def _watch_early(self, heard: int) -> None:
        # Python runs `_ask` when the main thread comes back from a library's code; its number arrives here before.
        while number := os.read(heard, 1):
            if number[0] == signal.SIGTERM and not self._begun:
                os._exit(self._leave())
