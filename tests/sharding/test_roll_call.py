"""Processes find one another, or say who is missing."""

from __future__ import annotations

import socket
import threading
import time

import jax
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.sharding import distributed
from qwen2_jax.sharding.distributed import COORDINATOR, PROCESS, PROCESSES, exchange, start
from qwen2_jax.sharding.roll_call import roll_call
from tools.launch_local import free_port


def call_all(*who, seconds=10.0, address=None):
    """What each (process, processes) says: None, or the error's text."""
    address = address or f"127.0.0.1:{free_port()}"
    said = [None] * len(who)

    def one(i, process, processes):
        try:
            roll_call(address, processes, process, seconds=seconds)
        except UserError as e:
            said[i] = str(e)

    threads = [threading.Thread(target=one, args=(i, *w)) for i, w in enumerate(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return said


def test_all_are_there_in_any_order():
    assert call_all((2, 3), (0, 3), (1, 3)) == [None] * 3
    assert call_all((0, 1)) == [None]


def test_the_absent_are_named_to_all_who_came():
    began = time.monotonic()
    said = call_all((0, 4), (2, 4), seconds=1.0)
    assert time.monotonic() - began < 8
    assert len(set(said)) == 1
    assert "2 of 4 processes did not come within 1 seconds: number 1, 3. There are 0 on" in said[0]


def test_process_zero_is_absent():
    [said] = call_all((1, 2), seconds=0.5)
    assert said.startswith("process 1: process 0 at 127.0.0.1:") and "did not answer within" in said


def test_two_of_one_number_and_other_counts():
    said = call_all((0, 3), (1, 3), (1, 3))
    assert all("two processes have the number 1" in text for text in said)
    said = call_all((0, 2), (1, 3))
    assert said[0] == said[1] and "counts 3 processes, process 0 counts 2" in said[0]


def test_strangers_are_passed_over():
    port = free_port()
    def knock():
        for message in (b"GET / HTTP/1.0\r\n\r\n", b'{"process": "x"}', b"[]", b""):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                        stranger.sendall(message)
                    break
                except OSError:
                    time.sleep(0.02)

    stranger = threading.Thread(target=knock)
    stranger.start()
    late = threading.Timer(0.5, lambda: call_all((1, 2), address=f"127.0.0.1:{port}"))
    late.start()
    assert call_all((0, 2), address=f"127.0.0.1:{port}") == [None]
    stranger.join()


@pytest.mark.parametrize("address, process, message", [
    ("localhost", 0, "must be host:port, found 'localhost'"), ("a:99999", 0, "must be host:port"),
    ("localhost:80", 2, "process number 2 must lie between 0 and 1"),
    ("no-such-host.invalid:9", 1, "cannot find process 0's host no-such-host.invalid within 0 s"),
    ("localhost:" + 5000 * "9", 0, "must be host:port"), ("localhost:٨٠", 0, "must be host:port"),
])
def test_what_is_refused(address, process, message):
    with pytest.raises(UserError, match=message):
        roll_call(address, 2, process, seconds=0.5)


@pytest.mark.parametrize("host, message", [
    ("a..b", "no host is called 'a..b'"), (5000 * "a", "no host is called 'a{40}'"),
    (100 * "ab." + "c", "longer than 253 letters: .* has 301"),
])
@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_can_never_be_found_is_refused_at_once(host, message, process):
    with pytest.raises(UserError, match=message):
        roll_call(f"{host}:80", 2, process, seconds=1000)


def test_a_host_whose_name_comes_later(monkeypatch):
    port, known = free_port(), []
    look_up = socket.getaddrinfo

    def later(host, *args, **kwargs):
        if host != "worker-0":
            return look_up(host, *args, **kwargs)
        known.append(host)
        if len(known) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", later)
    assert call_all((0, 2), (1, 2), address=f"worker-0:{port}") == [None, None] and len(known) >= 3


@pytest.mark.parametrize("processes", [0, 10**9])
def test_no_number_of_processes(processes):
    with pytest.raises(UserError, match=f"{PROCESSES}: there must be 1 to 1048576 processes, found {processes}"):
        roll_call("localhost:80", processes, 0, seconds=0.5)


def test_many_absent_ones_fit_into_the_message():
    said = call_all((0, 5000), (1, 5000), seconds=0.5)
    assert said[0] == said[1] and "4998 of 5000 processes did not come" in said[0]
    assert "number 2, 3, 4" in said[0] and ", 17, and 4982 more. There are 0 on" in said[0]


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken:
        with pytest.raises(UserError, match=r"cannot listen on port .* is another run using it"):
            roll_call(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, seconds=0.5)


def test_start():
    start({})   # one process: nothing to do
    with pytest.raises(UserError, match=f"{PROCESS} must be set beside {COORDINATOR} and {PROCESSES}"):
        start({COORDINATOR: "a:1", PROCESSES: "2"})
    with pytest.raises(UserError, match=f"{PROCESSES} must be a whole number, found 'two'"):
        start({COORDINATOR: "a:1", PROCESSES: "two", PROCESS: "0"})
    for number in (5000 * "9", 20 * "9", "٤", "-1"):
        with pytest.raises(UserError, match=f"{PROCESSES} must be a whole number, found '{number[:40]}'"):
            start({COORDINATOR: "a:1", PROCESSES: number, PROCESS: "0"})


def test_processes_that_others_have_started(monkeypatch):
    """Numbers come from JAX's detection; the roll is called all the same."""
    with pytest.raises(UserError, match=f"{COORDINATOR}=auto: JAX knows no cluster around this process; set"):
        start({COORDINATOR: "auto"})
    called = []
    monkeypatch.setattr(distributed.ClusterEnv, "auto_detect_unset_distributed_params",
                        lambda *_: ("worker-0:8482", 4, 3, None))
    monkeypatch.setattr(distributed, "roll_call", lambda *args, seconds: called.append((*args, seconds)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: called.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    start({COORDINATOR: "auto"}, seconds=5)
    assert called == [("worker-0:8482", 4, 3, 5), ("worker-0:8482", 4, 3, None)]


def test_a_silent_process_is_named(monkeypatch):
    assert exchange("host", {"a": 1}, seconds=1) == [{"a": 1}]      # alone

    class Client:
        def __init__(self):
            self.said = {}

        def key_value_set(self, key, text):
            self.said[key] = text

        def blocking_key_value_get(self, key, milliseconds):
            if key not in self.said:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.said[key]

    class State:
        client, process_id, num_processes = Client(), 0, 2

    monkeypatch.setattr(distributed, "global_state", State)
    with pytest.raises(UserError, match="process 1 said nothing about its host for 7 seconds"):
        exchange("host", {"a": 1}, seconds=7)
    State.client.said["qwen2_jax/host/1"] = '{"b": 2}'
    assert exchange("host", {"a": 1}, seconds=7) == [{"a": 1}, {"b": 2}]
