"""The training loop: dispatch a step, then read the numbers of the one before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen2_jax.errors import UserError


class Hook:
    """What happens around steps; steps are counted from 1, as updates made."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """The step's numbers on the host, one step late: what the step returned, `time_step` (seconds since the step
        before was done) and `time_data` (seconds that the loop waited for the batch)."""

    def due(self, step: int, last: bool) -> bool:
        """Whether `after_step` wants the state after this step; `last`: no other follows."""
        return False

    def after_step(self, step: int, state: Any) -> None:
        """Where due: after the numbers of all steps up to this one, before the next is dispatched, which is given the
        state's arrays."""

    def close(self) -> None:
        """The loop ended or failed."""


def fit(state: Any, step: Callable, batches: Iterable[Any], *, start: int = 0, stop: int, hooks: Sequence[Hook] = (),
        stopped: Callable[[int], bool] = lambda step: False) -> tuple[Any, int]:
    """Make updates start + 1 to stop, one a batch, or fewer when `stopped(step)` says after one that it is the last;
    return the state and the number of its last update.

    While the host waits for the numbers of step n, the device is already busy with step n + 1, unless a hook is due at
    step n. Exactly one batch is taken for each update, so the iterator's position belongs to the state that
    `after_step` sees. Raises UserError when the batches end early.
    """
    source = iter(batches)
    reports, n = _Reports(hooks), start
    try:
        for n in range(start + 1, stop + 1):
            began = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                raise UserError(f"the data ended after {n - 1} of {stop} steps: give more data or fewer steps")
            waited = time.perf_counter() - began
            state, metrics = step(state, batch)
            reports.give()
            reports.take(n, metrics, waited)
            last = n == stop or stopped(n)
            if due := [hook for hook in hooks if hook.due(n, last)]:
                reports.give()
                for hook in due:
                    hook.after_step(n, state)
            if last:
                break
        reports.give()
    finally:
        for hook in hooks:
            hook.close()
    return state, n


class _Reports:
    """The numbers of at most one step that nobody has been told yet."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = hooks
        self._waiting: tuple[int, dict[str, Any], float] | None = None
        self._last = time.perf_counter()

    def take(self, step: int, metrics: dict[str, Any], waited: float) -> None:
        self._waiting = step, metrics, waited

    def give(self) -> None:
        if self._waiting is None:
            return
        step, metrics, waited = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in metrics.items()}     # waits for the device
        now = time.perf_counter()
        values |= {"time_step": now - self._last, "time_data": waited}
        self._last = now
        for hook in self._hooks:
            hook.on_metrics(step, values)
