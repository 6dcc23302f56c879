"""Dying at a named point, for tests that kill: QWEN2_JAX_FAULT=mid_write:2 ends the process group with SIGKILL when a
process comes to `mid_write` for the second time. Without the variable a point costs a function call."""

from __future__ import annotations

import functools
import itertools
import os
import signal

from qwen2_jax.errors import UserError

VARIABLE = "QWEN2_JAX_FAULT"

POINTS = {
    "after_temporary_folder": "the step's temporary folder is there, and nothing of the step in it",
    "mid_write": "the arrays are written but not yet joined to one database",
    "before_rename": "the temporary folder is complete",
    "after_rename": "it has the step's name, and no digests",
    "before_digest": "all files are digested, the digests not written",
    "after_digest": "the digests are written, the mark that the step is being saved is still there, nothing is logged",
    "during_retention": "a step that is not kept has lost its name and some of its files",
    "during_metrics_write": "half a line is written",
}

_counts = {point: itertools.count(1) for point in POINTS}


def reach(point: str) -> None:
    """Ends the process group here, if this is the point and the time that the environment names."""
    if armed() == (point, next(_counts[point])):
        os.killpg(0, signal.SIGKILL)


@functools.cache
def armed() -> tuple[str, int] | None:
    """(point, count) that the environment names, None without; UserError when it names none of ours."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    point, _, count = value.partition(":")
    if point not in POINTS or not (count or "1").isdecimal() or int(count or "1") < 1:
        raise UserError(f"{VARIABLE}={value} is not POINT or POINT:COUNT with a point of {', '.join(POINTS)}")
    return point, int(count or "1")
