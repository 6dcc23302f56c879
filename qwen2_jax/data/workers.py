"""A function over tasks in several processes, results in the tasks' order.

`concurrent.futures` would leave its workers behind when the parent is killed, and a `multiprocessing.Pool` waits
forever for a worker that was. Here each worker has a pipe of its own and at most one task: whoever dies, the other side
reads the end of the pipe.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from qwen2_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 8   # tasks a worker's share may run ahead of the oldest unfinished one: bounds the results that wait
ENDED = ConnectionError     # with EOFError, what a pipe says whose other end is gone


def ordered(start: Callable[[], Callable[[T], R]], tasks: Iterable[T], workers: int
            ) -> Generator[R, None, None]:
    """`function(task)` of each task, in order, where `function = start()` is made once in each process.

    With one worker all happens in this process. What a task or the iterator of tasks raises comes after the results of
    all tasks before it. Workers ignore Ctrl-C and SIGTERM: they end when the generator is closed or this process dies.

    Raises:
      UserError: a worker process died.
    """
    if workers == 1:
        function = start()
        for task in tasks:
            yield function(task)
        return
    pool = _Pool(start)
    try:
        yield from _in_order(pool, iter(tasks), workers)
    finally:
        pool.kill()


def _in_order(pool: _Pool, tasks: Iterator[Any], workers: int) -> Iterator[Any]:
    pending: deque[Any] = deque()
    replies: dict[int, _Reply] = {}
    given = due = 0     # numbers of the next task to hand out, and of the next result to yield
    failure: Exception | None = None
    more = True
    while True:
        while more and len(pending) < workers - pool.busy and given + len(pending) - due < AHEAD * workers:
            try:
                pending.append(next(tasks))
            except StopIteration:
                more = False
            except Exception as error:      # told after the results of the tasks before it
                failure, more = error, False
        pool.grow(min(workers, pool.busy + len(pending)))
        while pending and pool.idle:
            pool.give(given, pending.popleft())
            given += 1
        while due in replies:
            yield replies.pop(due).value()
            due += 1
        if due == given and not pending and not more:
            break
        if pool.busy or pool.starting:
            replies.update(pool.collect())
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class _Reply:
    result: Any
    error: Exception | None = None

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class _Pool:
    def __init__(self, start: Callable[[], Callable[[Any], Any]]):
        self._start = start
        self._processes: dict[Connection, BaseProcess] = {}
        self._starting: set[Connection] = set()
        self._busy: dict[Connection, int] = {}
        self.idle: list[Connection] = []

    @property
    def busy(self) -> int:
        return len(self._busy)

    @property
    def starting(self) -> int:
        return len(self._starting)

    def grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")      # forking a process with threads may hang
        if len(self._processes) < size:
            resource_tracker.ensure_running()   # it would unblock the signal below when a process starts it
        while len(self._processes) < size:
            ours, theirs = context.Pipe()
            # A signal that is blocked here stays blocked in the child, and reaches us after the unblocking.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                process = context.Process(target=_serve, args=(theirs, self._start), daemon=True)
                process.start()
                self._processes[ours] = process
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
            self._starting.add(ours)

    def give(self, number: int, task: Any) -> None:
        worker = self.idle.pop()
        self._busy[worker] = number
        try:
            worker.send(task)
        except ENDED:
            raise self._died(worker) from None

    def collect(self) -> Iterator[tuple[int, _Reply]]:
        """Waits for at least one worker; the results that came."""
        for worker in wait([*self._busy, *self._starting]):
            assert isinstance(worker, Connection)
            try:
                reply = worker.recv()
            except (EOFError, ENDED):
                raise self._died(worker) from None
            self.idle.append(worker)
            if worker not in self._starting:
                yield self._busy.pop(worker), reply
                continue
            self._starting.remove(worker)
            reply.value()       # what `start` raised

    def _died(self, worker: Connection) -> UserError:
        process = self._processes[worker]
        process.join()
        return UserError(f"a worker process died (exit code {process.exitcode}; -9 is often a lack of memory): take "
                         "fewer workers; the same command goes on where this one stopped")

    def kill(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()


def _serve(connection: Connection, start: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        try:
            function = start()
        except Exception as error:
            return connection.send(_Reply(None, error))
        connection.send(_Reply(None))
        while True:
            task = connection.recv()
            try:
                reply = _Reply(function(task))
            except Exception as error:
                reply = _Reply(None, error)
            connection.send(reply)
    except (EOFError, ENDED):   # the parent has closed our pipe, or died
        return
