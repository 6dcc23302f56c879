"""What is wrong is said; what is in order is not."""

from __future__ import annotations

import copy

import pytest

from qwen2_jax.sharding import diagnosis
from qwen2_jax.sharding.health import RoundTrip

HOST = {"host": "w-0", "versions": {"python": "3.12.1", "jax": "0.10.2", "libtpu": "0.0.42.1"},
        "libtpu_wanted": "==0.0.42.*", "tpu_chips": 4, "gpu": False, "tpu_holders": [], "tpu_lockfile": False,
        "settings": {}, "disk": {"folder": "/home/u", "free": 2 << 30}, "cache": {"folder": "/c", "writable": True}}
DEVICES = {"backend": "tpu", "device_kind": "TPU v5 lite", "devices": 8, "processes": 2, "local": [1, 2, 3, 4]}


def hosts(n=1, **changes):
    """`n` hosts in order, the last of them with changes; "settings.XLA_FLAGS" reaches into it."""
    found = [copy.deepcopy(HOST) | {"host": f"w-{i}"} for i in range(n)]
    for path, value in changes.items():
        node, *rest = path.split("__")
        if rest:
            found[-1][node][rest[0]] = value
        else:
            found[-1][node] = value
    return found


def test_nothing_is_wrong():
    assert diagnosis.before_start(hosts(3)) == [] and not diagnosis.blocked(hosts(3))
    assert diagnosis.of_devices(hosts(2), [DEVICES, DEVICES]) == []


HOLDER = {"pid": 7, "command": "python " + "x" * 100, "files": ["/dev/accel0"]}


@pytest.mark.parametrize("changes, sentence", [
    ({"versions__libtpu": None}, "w-0: there are 4 TPU chips, but libtpu is not installed"),
    ({"versions__libtpu": "0.0.52"}, "w-0: libtpu 0.0.52 does not belong to JAX 0.10.2, which wants ==0.0.42.*"),
    ({"tpu_holders": [HOLDER]}, "w-0: process 7 (python xxxx"),
    ({"tpu_lockfile": True}, "w-0: /tmp/libtpu_lockfile is there, but no process of yours"),
    ({"settings__JAX_PLATFORMS": "cpu"}, "w-0: JAX_PLATFORMS=cpu keeps JAX from the 4 TPU chips"),
    ({"disk__free": 5 << 20}, "w-0: 5 MiB are free on the disk of /home/u"),
    ({"cache__writable": False}, "w-0: the compilation cache /c cannot be written"),
])
def test_one_host(changes, sentence):
    [said] = diagnosis.before_start(hosts(1, **changes))
    assert said.startswith(sentence)
    assert diagnosis.blocked(hosts(1, **changes)) == ("tpu_holders" in changes)


def test_a_holder_explains_the_lockfile():
    [said] = diagnosis.before_start(hosts(1, tpu_holders=[HOLDER], tpu_lockfile=True))
    assert "end it first" in said


@pytest.mark.parametrize("changes, sentence", [
    ({"versions__jax": "0.11.0"}, "jax differs between hosts: 0.10.2 on w-0 (process 0), w-1 (process 1); "
                                  "0.11.0 on w-2 (process 2)"),
    ({"versions__flax": "0.12"}, "flax differs between hosts: not installed on w-0 (process 0), w-1 (process 1); 0.12"),
    ({"settings__XLA_FLAGS": "--x"}, "XLA_FLAGS differs between hosts: not set on w-0 (process 0), w-1 (process 1); "
                                     "--x on w-2 (process 2)"),
])
def test_hosts_that_differ(changes, sentence):
    [said] = diagnosis.before_start(hosts(3, **changes))
    assert said.startswith(sentence)
    assert diagnosis.before_start(hosts(3, settings__QWEN2_JAX_PROCESS="2")) == []


def test_devices():
    cpu = DEVICES | {"backend": "cpu"}
    [said] = diagnosis.of_devices(hosts(2), [DEVICES, {"error": "no TPU found"}])
    assert said == "w-1 (process 1): JAX cannot start its devices: no TPU found"
    assert "although the machine has 4 TPU chips" in diagnosis.of_devices(hosts(2), [DEVICES, cpu])[0]
    assert diagnosis.of_devices(hosts(2, settings__JAX_PLATFORMS="cpu"), [DEVICES, cpu]) == []
    assert "an NVIDIA GPU" in diagnosis.of_devices(hosts(2, tpu_chips=0, gpu=True), [DEVICES, cpu])[0]
    assert diagnosis.of_devices(hosts(2, tpu_chips=0), [DEVICES, cpu]) == []
    [said] = diagnosis.of_devices(hosts(2), [DEVICES, DEVICES | {"device_kind": "TPU v6 lite"}])
    assert said.startswith("device kind differs between hosts: TPU v5 lite on w-0 (process 0); TPU v6 lite on")
    [said] = diagnosis.of_devices(hosts(2), [DEVICES, DEVICES | {"local": [1]}])
    assert said.startswith("number of devices differs between hosts: 4 on w-0 (process 0); 1 on")
    [said] = diagnosis.of_devices(hosts(2), [DEVICES | {"processes": 1}] * 2)
    assert said.startswith("JAX counts 1 processes, there are 2")


def trip(axis, gigabytes, *, exact=True, crosses=False):
    return RoundTrip(axis, 4, crosses, 1, 1.0, 1.0, gigabytes * 1e9, 2 * gigabytes * 1e9, exact)


def test_links():
    fast, slow = trip("fsdp_x", 40), trip("tensor", 9)
    [said] = diagnosis.of_round_trips([fast, slow, trip("fsdp_y", 41)], "tpu")
    assert said.startswith("axis tensor moves 9.00 GB/s a device where the other axes move 40.50")
    assert diagnosis.of_round_trips([fast, trip("tensor", 11)], "tpu") == []
    assert diagnosis.of_round_trips([fast, trip("data", 1, crosses=True)], "tpu") == []
    assert diagnosis.of_round_trips([fast, slow], "cpu") == []
    [said] = diagnosis.of_round_trips([trip("data", 1, exact=False)], "cpu")
    assert said.startswith("axis data: what came back is not the sum of what was sent")


@pytest.mark.parametrize("version, wanted, good", [
    ("0.0.42.1", "==0.0.42.*", True), ("0.0.42", "==0.0.42.*", True), ("0.0.421", "==0.0.42.*", False),
    ("0.0.52", "!=0.0.42.*", True), ("0.10.2", ">=0.10.1,<0.11", True), ("0.11.0", ">=0.10.1,<0.11", False),
    ("0.9.9", ">=0.10", False), ("0.10.2", "==0.10.2", True), ("0.10.2", "==0.10", False),
    ("0.0.45", "~=0.0.42", True), ("0.1.0", "~=0.0.42", False), ("0.0.43.dev1", ">0.0.42", True),
    ("3", "<=2", False), ("1", "something else", True),
])
def test_requirements(version, wanted, good):
    assert diagnosis.satisfies(version, wanted) is good
