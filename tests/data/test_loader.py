"""Workers change nothing but the time, and nobody waits for them: not at the end, after an error, or after a signal."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.data.loader import Loader
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.data.prepare import prepare
from qwen2_jax.data.stream import Stream
from qwen2_jax.errors import UserError
from tests.data.streams import MemorySource, make_stream, same_bytes

ROOT = Path(__file__).resolve().parents[2]
SOON = 20.0
"""Seconds after which something hangs; a busy machine takes two or three."""


class SlowSource(MemorySource):
    """Its documents take a while, as from storage far away."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        time.sleep(0.01)
        return super().tokens(document, start, stop)


class TellingSource(MemorySource):
    """All tokens are 1 in a process that has imported JAX, else 2."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, 1 if "jax" in sys.modules else 2)


class DamagedSource(MemorySource):
    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        raise UserError(f"document {document} is damaged")


class DyingSource(MemorySource):
    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def stream_of(kind: Any) -> Stream:
    return Stream({"only": kind([np.zeros(100)] * 10)}, row_length=8, batch_size=2, seed=0)


@pytest.fixture(scope="module")
def expected() -> list[PackedBatch]:
    stream = make_stream()
    return [stream.batch(n) for n in range(201)]


@pytest.mark.parametrize(("workers", "hosts"), [(0, 1), (0, 2), (0, 4), (1, 1), (1, 4), (3, 1), (3, 2)])
def test_bytes_are_the_same_for_any_workers_and_hosts(expected, workers, hosts):
    mine = 8 // hosts
    loaders = [Loader(make_stream(), rows=slice(host * mine, (host + 1) * mine), workers=workers)
               for host in range(hosts)]
    try:
        for batch in expected:
            parts = [next(loader) for loader in loaders]
            joined = PackedBatch(*(np.concatenate([getattr(part, field.name) for part in parts])
                                   for field in fields(PackedBatch)))
            assert same_bytes(joined, batch)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_begins_at_any_step(expected, workers):
    with Loader(make_stream(), 123, workers=workers) as batches:
        for batch, wanted in zip(batches, expected[123:140], strict=False):
            assert same_bytes(batch, wanted)


def test_prepared_shards_give_what_their_documents_give(tmp_path, trained_folder, trained, monkeypatch):
    """Read by memory map, over several shards, also by workers."""
    texts = [f"Document {i} has " + "so many words " * (i % 7 * i) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for room in ("text_source", "prepare"):
        monkeypatch.setattr(f"qwen2_jax.data.{room}.PIECE_BYTES", 10_000)
    shards = prepare([str(tmp_path / "text.jsonl")], tmp_path / "out", trained_folder, workers=1, shard_tokens=1)
    assert len(shards.documents) > 2
    in_memory: Any = MemorySource([np.array([*trained.encode(text), shards.end_token]) for text in texts])
    in_memory.vocab, in_memory.end_token = shards.vocab, shards.end_token
    arguments: Any = {"row_length": 64, "batch_size": 4, "seed": 3}
    expected = Stream({"only": in_memory}, **arguments)
    with Loader(Stream({"only": shards}, **arguments), workers=2) as batches:
        for n, batch in zip(range(50), batches, strict=False):
            assert same_bytes(batch, expected.batch(n))


def test_batches_are_made_ahead():
    source: Any = MemorySource([np.zeros(100)] * 10)
    with Loader(Stream({"only": source}, row_length=8, batch_size=2, seed=0)) as batches:
        assert reaches(lambda: len(source.reads) >= 4), "the second is made before the first is asked for"
        next(batches)


def test_workers_do_not_import_jax():
    """A second and 200 MB each, and where an accelerator is for one process alone, danger."""
    with Loader(stream_of(TellingSource), workers=2) as batches:
        assert (next(batches).ids_BT == 2).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_and_does_not_go_away(workers):
    with Loader(stream_of(DamagedSource), workers=workers) as batches:
        for _ in range(3):
            with pytest.raises(UserError, match=r"document \d is damaged"):
                next(batches)
    assert not multiprocessing.active_children()


def test_a_worker_that_was_killed_is_named():
    with Loader(stream_of(DyingSource), workers=2) as batches, pytest.raises(UserError, match="worker"):
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_nobody_waits_after_the_consumer_raised(workers):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Loader(stream_of(SlowSource), workers=workers) as batches:
        next(batches)
        raise KeyboardInterrupt
    assert time.monotonic() - began < SOON
    assert not multiprocessing.active_children()
    assert reaches(lambda: not any("grain" in thread.name for thread in threading.enumerate()))


def test_large_batches_do_not_stop_the_end():
    """A batch that fills a pipe many times, while the workers write it."""
    large: Any = MemorySource([np.zeros(100_000)] * 10)
    stream = Stream({"only": large}, row_length=32_768, batch_size=8, seed=0)
    began = time.monotonic()
    with Loader(stream, workers=2) as batches:
        assert len(list(islice(batches, 2))) == 2
    assert time.monotonic() - began < SOON


def test_a_number_of_workers_below_none_is_refused():
    with pytest.raises(UserError, match="data workers must be 0 or more, found -1"):
        Loader(make_stream(), workers=-1)


READER = """
import multiprocessing, os, signal, sys, time
from qwen2_jax.data.loader import Loader
from tests.data.streams import make_stream

if __name__ == "__main__":
    told = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    batches = Loader(make_stream(), workers=2)
    while sys.argv[1] == "signals" and len(told) < 100:     # from before the workers are there
        os.killpg(0, signal.SIGTERM if len(told) % 2 else signal.SIGINT)
        time.sleep(0.02)
    next(batches)
    told.clear()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "signals":
        while len(told) < 2:
            signal.sigtimedwait([], 0.05)
        for _ in range(50):
            next(batches)
        print("told and went on", flush=True)
    elif sys.argv[1] == "wait":
        signal.sigtimedwait([], 60)
    # The loader is not closed.
"""


@pytest.fixture
def reader(tmp_path, process_env):
    """Starts a process in a group of its own that reads with two workers; gives it and the workers' ids."""
    script = tmp_path / "reader.py"
    script.write_text(READER)
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen([sys.executable, str(script), what], env=process_env, cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], SOON)[0], "the first batch does not come"
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_workers_ignore_the_signals_of_their_group(reader):
    """The process that trains gets them, finishes its step and saves; its workers go on meanwhile."""
    process, workers = reader("signals")
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=SOON)
    assert (process.returncode, output) == (0, "told and went on\n")
    assert reaches(lambda: not any(map(alive, workers)))


def test_workers_end_with_the_process_that_started_them(reader):
    process, workers = reader("wait")
    process.kill()
    assert len(workers) == 2 and reaches(lambda: not any(map(alive, workers)))


def test_a_program_ends_that_does_not_close_its_loader(reader):
    process, workers = reader("end")
    assert process.wait(timeout=SOON) == 0
    assert len(workers) == 2 and reaches(lambda: not any(map(alive, workers)))


def reaches(condition) -> bool:
    """Whether the condition comes true soon."""
    end = time.monotonic() + SOON
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
