"""The training loop: dispatch a step, then read the numbers of the one before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen2_jax.errors import UserError


class Hook:
    """What happens around steps; steps are counted from 1, as updates made."""

    def after_step(self, step: int, state: Any) -> None:
        """Right after dispatch, before the next: the only time at which `state` may be used."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """The step's numbers on the host, one step late."""

    def close(self) -> None:
        """The loop ended or failed."""


def fit(state: Any, step: Callable, batches: Iterable[Any], *, start: int = 0, stop: int,
        hooks: Sequence[Hook] = ()) -> Any:
    """Make updates start + 1 to stop, one a batch; return the state.

    While the host waits for the metrics of step n, the device is already busy with step n + 1. Exactly one batch is
    taken for each update, so the iterator's position belongs to the state that `after_step` sees. Raises UserError
    when the batches end early.
    """
    source = iter(batches)
    waiting = None
    try:
        for n in range(start + 1, stop + 1):
            batch = next(source, None)
            if batch is None:
                raise UserError(f"the data ended after {n - 1} of {stop} steps: give more data or fewer steps")
            state, metrics = step(state, batch)
            if waiting is not None:
                _report(hooks, *waiting)
            for hook in hooks:
                hook.after_step(n, state)
            waiting = n, metrics
        if waiting is not None:
            _report(hooks, *waiting)
    finally:
        for hook in hooks:
            hook.close()
    return state


def _report(hooks: Sequence[Hook], step: int, metrics: dict[str, Any]) -> None:
    values = {name: float(value) for name, value in metrics.items()}     # waits for the device
    for hook in hooks:
        hook.on_metrics(step, values)
