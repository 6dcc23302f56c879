"""A run in its folder: what it leaves, and that a run which was stopped is the run which was not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.errors import UserError
from qwen2_jax.settings import with_settings
from qwen2_jax.train.loop import Hook
from qwen2_jax.train.metrics import read_metrics
from qwen2_jax.train.run import train
from qwen2_jax.train.run_folder import begin, read_config
from tests.conftest import ROOT
from tests.train.runs import tiny_experiment, write_text

pytestmark = [pytest.mark.optax, pytest.mark.slow]
EXACT = ("step", "loss", "nll", "grad_norm", "learning_rate", "tokens", "tokens_seen")
"""What a line holds beside times."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):     # Optax's updates
        assert go(tiny_experiment(text), out) == 0
    return out


def go(experiment, out, *, hooks=(), resume="auto", fork=None):
    said = []
    start = begin(experiment, out, resume=resume, fork=fork)
    return train(start, say=said.append, peak_flops=lambda experiment: None, hooks=lambda start, corpus: hooks)


def lines(out):
    return [{name: line[name] for name in EXACT} for line in read_metrics(out / "metrics.jsonl")]


class At(Hook):
    """Calls `do` when the numbers of a step are there."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_metrics(self, step, metrics):
        if step == self.step:
            self.do()


def test_what_a_run_leaves(whole, text):
    assert {p.name for p in whole.iterdir()} == {"checkpoints", "config.json", "data", "eval.jsonl", "metrics.jsonl",
                                                 "status.json", "tokenizer"}
    assert json.loads((whole / "status.json").read_text()) == {"state": "finished", "step": 6, "steps": 6}
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 4, 5, 6]
    assert lines(whole)[-1]["tokens"] == 6 * 4 * 32 and lines(whole)[-1]["loss"] < lines(whole)[0]["loss"]
    assert [json.loads(line)["step"] for line in (whole / "eval.jsonl").read_text().splitlines()] == [3, 6]
    assert read_config(whole) == tiny_experiment(text).resolved()


def test_every_step_that_stays_is_a_checkpoint_that_opens(whole):
    steps = sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdecimal())
    assert steps == [0, 2, 4, 6]
    for step in (0, 6):
        assert open_checkpoint(whole / "checkpoints" / str(step)).cfg.vocab == tiny_experiment(whole).model.vocab


def test_a_run_that_failed_goes_on_to_the_same_end(whole, text, tmp_path):
    """It fails after the numbers of step 5, when step 4 has been saved: step 5 is made, and written, once more."""
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tiny_experiment(text), tmp_path / "run", hooks=[At(5, fail)])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    assert go(tiny_experiment(text), tmp_path / "run") == 0
    assert lines(tmp_path / "run") == lines(whole)
    assert (tmp_path / "run" / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    superseded = read_metrics(tmp_path / "run" / "metrics.superseded.jsonl")
    assert [line["step"] for line in superseded] == [5]


def test_sigterm_ends_a_run_after_the_step_at_hand(whole, text, tmp_path):
    experiment = tiny_experiment(text, preempt_exit_code=75)
    before = signal.getsignal(signal.SIGTERM)
    assert go(experiment, tmp_path / "run", hooks=[At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))]) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted" and 2 <= status["step"] < 6
    assert (tmp_path / "run" / "checkpoints" / str(status["step"])).is_dir()
    assert go(experiment, tmp_path / "run") == 0
    assert lines(tmp_path / "run") == lines(whole)


def test_sigterm_while_the_first_step_is_compiled_ends_at_once(text, tmp_path):
    """In a process of its own; the signal comes when the run has begun and no step is done."""
    program = tmp_path / "program.py"
    program.write_text(EARLY.format(root=str(ROOT), text=str(text), out=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "before the first step" in done.stdout and "not reached" not in done.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"


EARLY = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
from qwen2_jax.train import run
from qwen2_jax.train.run_folder import begin
from tests.train.runs import tiny_experiment

def compiling(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()      # holds the main thread as a compiler does
    print("not reached")

run.make_step = lambda *args, **kwargs: compiling
start = begin(tiny_experiment({text!r}, preempt_exit_code=75), Path({out!r}))
run.train(start, say=lambda line: print(line, flush=True), peak_flops=lambda experiment: None)
"""


def test_a_fork_goes_on_with_other_settings_and_leaves_the_run_alone(whole, text, tmp_path):
    before = sorted(str(p) for p in whole.rglob("*"))
    slower = with_settings(tiny_experiment(text), ["optimizer.peak=1e-3", "steps=5"])
    assert go(slower, whole, resume=str(whole / "checkpoints" / "4"), fork=tmp_path / "fork") == 0
    [line] = lines(tmp_path / "fork")
    assert line["step"] == 5 and line["tokens"] == 5 * 4 * 32
    assert line["loss"] == lines(whole)[4]["loss"] and line["learning_rate"] < lines(whole)[4]["learning_rate"]
    assert sorted(str(p) for p in whole.rglob("*")) == before


def test_more_steps_go_on_from_the_end(whole, text, tmp_path):
    short = tiny_experiment(text, steps=3, optimizer=dataclasses.replace(tiny_experiment(text).optimizer, steps=6))
    assert go(short, tmp_path / "run") == 0
    assert go(dataclasses.replace(short, steps=6), tmp_path / "run") == 0
    assert lines(tmp_path / "run") == lines(whole)


def test_other_text_under_the_same_name_is_refused(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    experiment = tiny_experiment(text, steps=2, data=dataclasses.replace(tiny_experiment(text).data, held_out=0.0))
    assert go(experiment, tmp_path / "run") == 0
    write_text(text, documents=61)
    with pytest.raises(UserError, match=r"text\.jsonl"):
        go(dataclasses.replace(experiment, steps=4), tmp_path / "run")


@pytest.mark.parametrize(("changes", "message"), [
    (["optimizer.peak=1"], "optimizer.peak was 0.01, is 1.0"), (["seed=3"], "seed was 0, is 3"),
    (["data.batch_size=8", "model.layers=2"], "model.layers was 1, is 2; data.batch_size was 4, is 8"),
    (["optimizer=MuonConfig", "optimizer.peak=1"], "optimizer.class was \"AdamWConfig\", is \"MuonConfig\"")])
def test_settings_that_change_the_numbers_are_refused(whole, text, changes, message):
    with pytest.raises(UserError) as error:
        begin(with_settings(tiny_experiment(text), changes), whole)
    assert message in str(error.value) and "--fork NEWDIR" in str(error.value)


@pytest.mark.parametrize("change", ["steps=9", "mesh=data=2", "data.workers=1", "checkpoint.every=1", "remat=full"])
def test_settings_that_change_no_number_may_change(whole, text, change):
    start = begin(with_settings(tiny_experiment(text), [change]), whole)
    assert start.source == whole and start.experiment.optimizer.steps == 6


def test_a_start_that_never_came_to_training_can_be_made_with_other_settings(text, tmp_path):
    out = tmp_path / "run"
    wrong = tiny_experiment(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        go(wrong, out)
    assert json.loads((out / "status.json").read_text())["state"] == "starting"
    (out / "tokenizer").mkdir(exist_ok=True)
    (out / "tokenizer" / "tokenizer.json").write_text("of the other text")
    start = begin(tiny_experiment(text, steps=1), out)
    assert start.source is None and start.other_text
    assert go(tiny_experiment(text, steps=1), out) == 0
    assert [line["step"] for line in lines(out)] == [1]
    assert not begin(tiny_experiment(text, steps=2), out).other_text


def test_folders_that_are_refused(whole, text, tmp_path):
    experiment, other = tiny_experiment(text), tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    for out, options, message in (
            (whole, {"resume": "never"}, "--resume never needs a new or empty folder"),
            (other, {}, "--out needs a new or empty folder"),
            (other, {"resume": str(whole)}, "--out needs a new or empty folder"),
            (whole, {"fork": other}, "--fork needs a new or empty folder"),
            (whole, {"fork": tmp_path / "new", "resume": "never"}, "take one of them"),
            (tmp_path / "new", {"resume": str(other)}, "neither a run's folder"),
            (tmp_path / "new", {"fork": tmp_path / "newer"}, "holds no run")):
        with pytest.raises(UserError, match=message):
            begin(experiment, out, **options)
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged or of another program"):
        begin(experiment, other)
