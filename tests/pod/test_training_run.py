"""A run in several processes that one of them is told to end, and that one process goes on with."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2_jax.train.metrics import read_metrics
from qwen2_jax.train.run import train
from qwen2_jax.train.run_folder import begin, read_config
from tests.conftest import ROOT
from tests.train.runs import write_text

pytestmark = [pytest.mark.slow, pytest.mark.optax]

SAME_LOSS = 1e-5
"""Relative; float32 sums in another order, over some tens of steps."""
MOST = 10**6
FILE = """
from tests.train.runs import tiny_experiment
experiment = tiny_experiment({text!r}, steps={most}, preempt_exit_code=75)
"""


def test_one_process_is_told_and_all_end_after_the_same_step(process_env, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    (tmp_path / "experiment.py").write_text(FILE.format(text=str(text), most=MOST))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tools.launch_local", "-n", "2", "--devices", "1", "--", sys.executable, "-m",
               "qwen2_jax", "train", str(tmp_path / "experiment.py"), "--out", str(out), "--set", "mesh=data=2",
               "--set", "optimizer.schedule=constant", "--set", f"checkpoint.every={MOST}", "--set",
               f"evaluation.every={MOST}"]
    environment = process_env | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as launched:
        _wait_for(out / "metrics.jsonl", launched)
        os.kill(_worker(1, str(out)), signal.SIGTERM)
        said = launched.communicate(timeout=120)[0]
    assert launched.returncode == 75, said
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "preempted" and f"after step {status['step']} of" in said
    steps = status["step"]
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, steps + 1))

    experiment = dataclasses.replace(read_config(out), steps=steps + 2, mesh="")
    quiet = dict(say=lambda line: None, peak_flops=lambda experiment: None)
    assert train(begin(experiment, out), **quiet) == 0
    assert train(begin(experiment, tmp_path / "alone"), **quiet) == 0
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, tmp_path / "alone"))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=SAME_LOSS)


def _wait_for(path: Path, launched: subprocess.Popen) -> None:
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return
        assert launched.poll() is None, launched.communicate()[0]
        time.sleep(0.2)
    raise AssertionError(f"{path} did not appear")


def _worker(number: int, out: str) -> int:
    """The process id of a worker, told by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if out.encode() in words and f"QWEN2_JAX_PROCESS={number}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"worker {number} does not run")
