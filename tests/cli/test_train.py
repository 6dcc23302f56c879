"""`qwen2-jax train` and `data dump`, as a person calls them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen2_jax.train.metrics import read_metrics
from tests.conftest import ROOT
from tests.train.runs import write_text

pytestmark = [pytest.mark.optax, pytest.mark.slow]

FILE = """
import sys
sys.path.insert(0, {root!r})
from tests.train.runs import tiny_experiment
experiment = tiny_experiment({text!r})
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    text = write_text(folder / "text.jsonl")
    path = folder / "experiment.py"
    path.write_text(FILE.format(root=str(ROOT), text=str(text)))
    return path


def test_train_goes_on_and_its_batches_can_be_had(call, file, tmp_path):
    out = tmp_path / "run"
    done = call("train", file, "--out", out, "--set", "steps=2")
    assert done.returncode == 0 and done.stdout == ""
    assert "training a tokenizer of 320 tokens" in done.stderr
    done = call("train", file, "--out", out, "--set", "steps=3")
    assert done.returncode == 0 and f"going on from step 2 of {out}" in done.stderr
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]
    assert "has made its 3 steps already" in call("train", file, "--out", out, "--set", "steps=3").stderr

    assert call("data", "dump", out, "--steps", "2:3", "--out", tmp_path / "run.npz").returncode == 0
    assert call("data", "dump", file, "--steps", "1:3", "--out", tmp_path / "file.npz").returncode == 0
    of_run, of_file = np.load(tmp_path / "run.npz"), np.load(tmp_path / "file.npz")
    assert set(of_run) == {"input_ids", "targets", "loss_mask", "segment_ids", "positions"}
    for name in of_run:
        assert of_run[name].shape == (2, 4, 32) and of_run[name].dtype == np.int32
        np.testing.assert_array_equal(of_run[name], of_file[name][1:])
    assert [int(mask.sum()) for mask in of_run["loss_mask"]] == [
        b["tokens"] - a["tokens"] for a, b in zip(*(read_metrics(out / "metrics.jsonl")[i:i + 2] for i in (0, 1)),
                                                  strict=True)]


def test_help_lists_every_setting_of_a_file(call, file):
    plain = call("train", "--help")
    assert plain.returncode == 0 and "--resume auto|never|PATH" in plain.stdout
    assert "data.row_length" not in plain.stdout
    shown = call("train", file, "--help").stdout
    for line in ("  steps=6  (int)\n", "  optimizer.peak=0.01  (float)\n", "  model.rope.theta=10000.0  (float)\n",
                 "  mesh=(empty)  (text)\n", "  data.tokenizer=(empty)  (text)\n"):
        assert line in shown
    assert "Updates to make, from the first one on." in shown


@pytest.mark.parametrize(("text", "message"), [
    ("experiment = 3", "defines no `experiment` of the class"), ("x = 3", "found nothing of that name"),
    ("import nothing_of_this_name", "line 1: ModuleNotFoundError"), ("def f(:", "line 1: SyntaxError"),
    ("\n1 / 0", "line 2: ZeroDivisionError")])
def test_files_that_are_no_experiment(call, tmp_path, text, message):
    path = tmp_path / "file.py"
    path.write_text(text)
    done = call("train", path, "--out", tmp_path / "run")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--set", "stesp=3"], "there is no setting 'stesp'; did you mean steps"),
    (["--set", "steps=0"], "steps must be at least 1, found 0"),
    (["--set", "mesh=fsdp=3"], "data.batch_size 4 cannot be split over 3 devices"),
    (["--set", "mesh=pipeline=2"], "mesh axis 'pipeline'"),
    (["--set", "data.path=/nowhere/*.txt"], "/nowhere/*.txt"),
    (["--set", "data.path="], "set data.path to text"),
    (["--set", "data.row_length=65"], "data.row_length 65 is beyond the model's context of 64 tokens"),
    (["--set", "model.vocab=100"], "the setting is model.vocab"),
    (["--resume", "/nowhere"], "--resume /nowhere: neither a run's folder")])
def test_settings_that_cannot_be(call, file, tmp_path, flags, message):
    done = call("train", file, "--out", tmp_path / "run", *flags)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("steps", "message"), [("0:3", "from 1 on"), ("3", "A:B"), ("4:3", "A:B"), ("a:b", "A:B")])
def test_steps_that_cannot_be_dumped(call, file, tmp_path, steps, message):
    done = call("data", "dump", file, "--steps", steps, "--out", tmp_path / "x.npz")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "x.npz").exists()


def test_a_run_takes_no_settings_when_dumped(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    done = call("data", "dump", tmp_path, "--steps", "1:2", "--out", tmp_path / "x.npz", "--set", "steps=3")
    assert done.returncode == 2 and "its batches are what they are" in done.stderr
