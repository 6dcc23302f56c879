"""Runs that save and are killed, one after the other in one folder, each checking what the one before has left:

    python -m tests.checkpoint.killing FOLDER POINT[:COUNT]|SECONDS …    prints "ok" when all is well

POINT is one of `checkpoint.fault`; SECONDS is how long after opening the folder SIGKILL comes. All are forked from a
process that has imported everything and started nothing, since an import takes longer than a run.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.checkpoint import fault
from qwen2_jax.checkpoint.store import Store

KEEP, STEPS = 2, 8
LEAVES = {
    # of step {n}, when a process has died there: patterns over names that are in the folder, and over some that are not
    "after_temporary_folder": ([r"{n}\.saving", r"{n}\.orbax-checkpoint-tmp"], [r"{n}/"]),
    "mid_write": ([r"{n}\.saving", r"{n}\.orbax-checkpoint-tmp/params\.orbax\S*/ocdbt.process_0/d/\w+"],
                  [r"{n}\.orbax-checkpoint-tmp/params/manifest.ocdbt", r"{n}/"]),
    "before_rename": ([r"{n}\.saving", r"{n}\.orbax-checkpoint-tmp/params/manifest.ocdbt"], [r"{n}/"]),
    "after_rename": ([r"{n}\.saving", r"{n}/params/manifest.ocdbt"], [r"{n}/digests"]),
    "before_digest": ([r"{n}\.saving", r"{n}/params/manifest.ocdbt"], [r"{n}/digests"]),
    "after_digest": ([r"{n}\.saving", r"{n}/digests\.json"], []),
    "during_retention": ([r"\d+\.removing/params/manifest.ocdbt", r"{n}/digests\.json"], [r"\d+\.removing/digests"]),
}


def state_of(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    params = {"w": rng.normal(size=(3, 64, 256)).astype(np.float32), "b": rng.normal(size=7).astype(jnp.bfloat16)}
    return {"params": params, "optimizer": {"mu": params["w"] * 2, "count": np.int32(step)}}


def run(folder: Path, said: Path) -> None:
    """Checks what is there, then saves for as long as it lives."""
    logging.basicConfig(filename=said, level=logging.INFO, format="%(message)s", force=True)
    committed = [int(n) for n in re.findall(r"^checkpoint (\d+) committed", said.read_text(), re.M)]
    store = Store(folder, keep=KEEP)
    left = [p.name for p in folder.iterdir() if not p.name.isdecimal()]
    assert not left, f"left over: {left}"
    last = store.latest_step()
    assert not committed or (last is not None and last >= committed[-1]), f"{committed[-1]} was committed, not {last}"
    assert set(store.steps()) >= {n for n in committed[-KEEP:] if last is None or n > last - KEEP}, store.steps()
    if last is not None:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), state_of(last))
        found, about = store.restore(like)
        equal = jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, found, state_of(last))
        assert jax.tree.all(equal) and about == {"step": last}
    logging.info("opened")
    for step in range(0 if last is None else last + 1, (0 if last is None else last + 1) + STEPS):
        store.save(step, jax.device_put(state_of(step)), {"step": step})
    store.close()


def killed(folder: Path, said: Path, how: str) -> None:
    """One run to its end, by SIGKILL."""
    point = how.partition(":")[0]
    at_a_point = point in fault.POINTS
    opened = said.read_text().count("opened")
    pid = forked(lambda: run(folder, said), {fault.VARIABLE: how} if at_a_point else {})
    if not at_a_point:
        alive = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while said.read_text().count("opened") == opened and os.waitid(os.P_PID, pid, alive) is None:
            time.sleep(0.001)
        time.sleep(float(how))
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended_well = not at_a_point and status == 0     # the time was longer than the run
    assert ended_well or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), f"{how}: status {status}"
    if at_a_point:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
        n = max(int(name.partition("/")[0].partition(".")[0]) for name in names)
        present, absent = LEAVES[point]
        for pattern in (*present, *absent):
            found = any(re.match(pattern.format(n=n), name) for name in names)
            assert found == (pattern in present), f"{how}: {pattern} of step {n}: {sorted(names)}"


def forked(do: Callable[[], None], environment: dict[str, str]) -> int:
    """The id of a process, and of its group, that does it."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.environ |= environment
        try:
            do()
        except BaseException as e:
            logging.exception("failed")
            print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def main() -> None:
    folder = Path(sys.argv[1])
    said = folder.with_name(f"{folder.name}.log")
    said.touch()
    for how in sys.argv[2:]:
        killed(folder, said, how)
    assert os.waitpid(forked(lambda: run(folder, said), {}), 0)[1] == 0
    print("ok")


if __name__ == "__main__":
    main()
