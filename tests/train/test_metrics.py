from __future__ import annotations

import json
import math

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.train import metrics as metrics_module
from qwen2_jax.train.metrics import MetricsFile, Progress, bits_per_byte, read_metrics


def test_bits_per_byte():
    # A uniform guess over the 256 bytes costs 8 bits for each, however many bytes a token has.
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)
    assert bits_per_byte(250 * math.log(2**16), 1000) == pytest.approx(4.0)


def write(path, steps, start=0, **values):
    file = MetricsFile(path, start=start)
    for step in steps:
        file.on_metrics(step, {"loss": float(step)} | values)
    file.close()


def test_a_line_a_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, range(1, 4))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 3)]


def test_going_on_replaces_what_an_interrupted_run_wrote_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6), run=1.0)
    path.write_text(path.read_text() + '{"step": 6, "lo')     # killed while writing
    write(path, range(4, 6), start=3, run=2.0)
    assert [(r["step"], r["run"]) for r in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


def test_a_new_run_starts_afresh(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    write(path, range(1, 3))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_values_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1], norm=math.inf, other=math.nan)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) | {"seconds": 0} == {
        "step": 1, "seconds": 0, "loss": 1.0, "norm": None, "other": None}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/metrics\.jsonl"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_the_bar_shows_loss_rate_and_speed_without_the_compiling_step(monkeypatch, capsys):
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(clock))
    bar = Progress(start=0, stop=3)
    for step in (1, 2, 3):
        bar.on_metrics(step, {"loss": 2.5, "lr": 3e-4, "tokens": 1000.0})
    bar._bar.refresh()
    bar.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "3/3" in shown and "loss 2.500, lr 3.0e-04, 500 tokens/s" in shown
