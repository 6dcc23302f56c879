from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.errors import UserError
from qwen2_jax.train.metrics import NOTHING, MetricsFile, Progress, Totals, bits_per_byte, read_metrics


def test_bits_per_byte():
    # A uniform guess over the 256 bytes costs 8 bits for each, however many bytes a token has.
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)
    assert bits_per_byte(250 * math.log(2**16), 1000) == pytest.approx(4.0)


def write(path, steps, start=0, totals=NOTHING, **values):
    file = MetricsFile(path, start=start, totals=totals)
    for step in steps:
        file.on_metrics(step, {"loss": float(step), "targets": 10.0, "seen": 12.0, "time_step": 0.5} | values)
    file.sync()
    file.close()
    return file.totals


def test_a_line_a_step_with_running_totals(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, range(1, 4))
    assert [(r["step"], r["loss"], r["tokens"], r["tokens_seen"]) for r in read_metrics(path)] == [
        (1, 1, 10, 12), (2, 2, 20, 24), (3, 3, 30, 36)]


def test_going_on_moves_what_an_interrupted_run_wrote_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6), run=1.0)
    path.write_text(path.read_text() + '{"step": 6, "lo')     # killed while writing
    write(path, range(4, 6), start=3, totals=Totals(30, 36), run=2.0)
    lines = read_metrics(path)
    assert [(r["step"], r["run"], r["tokens"]) for r in lines] == [(1, 1, 10), (2, 1, 20), (3, 1, 30), (4, 2, 40),
                                                                   (5, 2, 50)]
    old = read_metrics(tmp_path / "metrics.superseded.jsonl")
    assert [(r["step"], r["run"]) for r in old] == [(4, 1), (5, 1)]


def test_lines_that_stay_are_not_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.read_bytes()
    write(path, [4], start=3)
    assert path.read_bytes().startswith(before) and not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_new_run_starts_afresh(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    write(path, range(1, 3))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_floats_read_back_bit_equal(tmp_path_factory, double, single):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, [1], double=double, single=float(np.float32(single)))
    [line] = read_metrics(path)
    assert struct.pack("<d", line["double"]) == struct.pack("<d", double)
    assert np.float32(line["single"]).tobytes() == np.float32(single).tobytes()


def test_mfu_is_a_share_of_what_the_devices_could_have_done(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", flops_share=0.1)
    file.on_metrics(1, {"targets": 1.0, "seen": 1.0, "time_step": 0.5})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["mfu"] == 0.2
    write(tmp_path / "other.jsonl", [1])
    assert read_metrics(tmp_path / "other.jsonl")[0]["mfu"] is None


def test_values_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1], norm=math.inf, other=math.nan)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1, "loss": 1.0, "norm": None, "other": None, "time_step": 0.5, "tokens": 10, "tokens_seen": 12,
        "mfu": None}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/metrics\.jsonl"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_the_bar_shows_loss_rate_and_speed_without_the_compiling_step(capsys):
    bar = Progress(start=0, stop=3)
    for step, seconds in ((1, 60.0), (2, 2.0), (3, 2.0)):
        bar.on_metrics(step, {"loss": 2.5, "learning_rate": 3e-4, "targets": 1000.0, "time_step": seconds})
    bar._bar.refresh()
    bar.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "3/3" in shown and "loss 2.500, lr 3.0e-04, 500 tokens/s" in shown
