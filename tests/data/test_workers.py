"""Results in order from several processes, and what happens when something ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from qwen2_jax.data.workers import ordered
from qwen2_jax.errors import UserError


def start(fail_at: int | None = None):
    """A function that is slow where its number is even, and fails at one; made in the worker."""
    made_in = os.getpid()

    def square(number: int) -> tuple[int, int]:
        if number % 2 == 0:
            time.sleep(0.02)
        if number == fail_at:
            raise UserError(f"task {number}")
        return number * number, made_in

    return square


def start_and_die():
    return lambda number: os.kill(os.getpid(), signal.SIGKILL)


def refuse_to_start():
    raise UserError("no tokenizer")


def numbers(stop: int, fail_at: int | None = None):
    for number in range(stop):
        if number == fail_at:
            raise UserError(f"source {number}")
        yield number


def test_results_come_in_order():
    alone = list(ordered(start, numbers(40), 1))
    assert [square for square, _ in alone] == [n * n for n in range(40)]
    assert {process for _, process in alone} == {os.getpid()}
    together = list(ordered(start, numbers(40), 3))
    assert [square for square, _ in together] == [n * n for n in range(40)]
    processes = {process for _, process in together}
    assert os.getpid() not in processes and len(processes) <= 3
    assert list(ordered(start, [], 3)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_comes_after_all_results_before_it(workers):
    for results, message in ((ordered(partial(start, 5), numbers(9), workers), "task 5"),
                             (ordered(start, numbers(9, fail_at=5), workers), "source 5")):
        found = []
        with pytest.raises(UserError, match=message):
            for square, _ in results:
                found.append(square)
        assert found == [0, 1, 4, 9, 16]


def test_a_worker_that_cannot_start_or_dies_is_told():
    with pytest.raises(UserError, match="no tokenizer"):
        list(ordered(refuse_to_start, numbers(3), 2))
    with pytest.raises(UserError, match=r"a worker process died \(exit code -9"):
        list(ordered(start_and_die, numbers(3), 2))


def test_no_more_workers_than_tasks():
    assert len({process for _, process in ordered(start, numbers(1), 8)}) == 1


def children(process: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()]


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


ENDLESS = """
import itertools, sys, time
sys.path.insert(0, {root!r})
from tests.data.test_workers import start
from qwen2_jax.data.workers import ordered
if __name__ == "__main__":
    for number, _ in ordered(start, itertools.count(), 2):
        print(number, flush=True)
"""


@pytest.mark.parametrize(("signal_number", "results"), [(signal.SIGKILL, 4), (signal.SIGINT, 4), (signal.SIGINT, 0)])
def test_workers_end_with_their_parent(tmp_path, signal_number, results):
    """Killed, or interrupted from the keyboard, which signals the whole group: the parent alone speaks, also when its
    workers are still starting."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.format(root=str(Path(__file__).resolve().parents[2])))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stdout is not None
    for _ in range(results):
        process.stdout.readline()
    wait_until(lambda: len(children(process.pid)) == 3)     # two, and Python's tracker of resources
    workers = children(process.pid)
    if signal_number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, signal_number)
    _, said = process.communicate(timeout=30)
    wait_until(lambda: not any(map(alive, workers)))
    assert said.count("Traceback") == (0 if signal_number == signal.SIGKILL else 1)
