"""`qwen2-jax doctor`: one process and several, both forms of output, exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from qwen2_jax.cli import doctor
from qwen2_jax.errors import UserError
from qwen2_jax.sharding import host
from tests.conftest import ROOT


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", "--repeats", "2", *argv])
    return args.run(args)


@pytest.fixture
def facts(monkeypatch):
    """Facts to be changed before the doctor sees them; roomy, so that a full disk here is no failure."""
    found = host.host_facts({"JAX_PLATFORMS": "cpu"})
    found["disk"]["free"] = 2 << 30
    monkeypatch.setattr(host, "host_facts", lambda: found)
    return found


def test_healthy(facts, capsys):
    assert run("--mesh", "tensor=2,fsdp=2x2", "--buffer-mib", "0.25") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "all       8 devices (cpu, cpu), 1 processes" and lines[-1] == "healthy"
    assert f"jax {facts['versions']['jax']}" in out and "JAX_PLATFORMS=cpu" in out
    assert "round trips on fsdp_x=2,fsdp_y=2,tensor=2, 0.25 MiB a device, median of 2" in out
    rows = [line.split() for line in lines if line.startswith(("fsdp_", "tensor"))]
    assert [(row[0], row[1], row[3], row[5], row[7], row[9]) for row in rows] == [
        (axis, "2", "ms", "GB/s", "ms", "GB/s") for axis in ("fsdp_x", "fsdp_y", "tensor")]


def test_json(facts, capsys):
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"fsdp_x": 8} and report["buffer_bytes"] == 4 << 20 and report["wrong"] == []
    assert report["hosts"][0]["versions"] == facts["versions"] and report["devices"][0]["devices"] == 8
    [trip] = report["round_trips"]
    assert trip["exact"] and trip["gather_seconds"] > 0


def test_what_is_wrong_is_status_2(facts, capsys):
    assert run("--mesh", "data=16") == 2
    assert capsys.readouterr().out.splitlines()[-1] == (
        "wrong: mesh 'data=16' needs 16 devices, this machine has 8")
    facts["tpu_chips"], facts["settings"] = 4, {}
    assert run("--mesh", "data=2", "--buffer-mib", "0.01") == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    assert any("JAX runs on the CPU, although the machine has 4 TPU chips" in line for line in wrong)


def test_a_held_tpu_stops_it_before_jax_is_asked(facts, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_devices", lambda: pytest.fail("would hang"))
    facts["tpu_holders"] = [{"pid": 7, "command": "python train.py", "files": ["/dev/accel0"]}]
    assert run() == 2
    assert "process 7 (python train.py) holds the TPU" in capsys.readouterr().out


def test_devices_that_do_not_start(facts, capsys, monkeypatch):
    monkeypatch.setattr("qwen2_jax.sharding.health.device_facts", lambda: 1 / 0)
    assert run() == 2
    assert "JAX cannot start its devices: division by zero" in capsys.readouterr().out


@pytest.mark.parametrize("flag, message", [
    (("--repeats", "0"), "--repeats must be at least 1"), (("--buffer-mib", "0"), "--buffer-mib must lie above 0"),
    (("--buffer-mib", "nan"), "--buffer-mib must lie above 0"),
])
def test_wrong_flags(flag, message):
    with pytest.raises(UserError, match=message):
        run(*flag)


@pytest.mark.slow
def test_two_processes_and_one_of_them_differs(process_env):
    """Each host's facts reach process 0, which alone speaks; the other runs another XLA."""
    start = ("import os, sys; n = os.environ['QWEN2_JAX_PROCESS']\n"
             "if n == '1': os.environ['JAX_ENABLE_X64'] = '0'\n"
             "from qwen2_jax.cli.main import entry; sys.exit(entry())")
    argv = ["doctor", "--json", "--mesh", "data=2,tensor=2", "--buffer-mib", "0.1", "--repeats", "2"]
    done = subprocess.run([sys.executable, "-m", "tools.launch_local", "-n", "2", "--devices", "2", "--",
                           sys.executable, "-c", start, *argv],
                          cwd=ROOT, env=process_env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    told = done.stdout[done.stdout.index("[0] {\n"):].splitlines()
    assert all(line.startswith("[0] ") for line in told)
    report = json.loads("\n".join(line[4:] for line in told))
    assert len(report["hosts"]) == 2 and [d["processes"] for d in report["devices"]] == [2, 2]
    assert [t["axis"] for t in report["round_trips"]] == ["data", "tensor"]
    assert all(t["exact"] for t in report["round_trips"])
    [said] = [text for text in report["wrong"] if "free on the disk" not in text]
    assert said.startswith("JAX_ENABLE_X64 differs between hosts: not set on ") and "0 on " in said
