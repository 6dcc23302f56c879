"""What the GPU benchmark says where there is no GPU, and how it counts; its measurements need one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tools import bench_gpu
from tools.bench_gpu import ROWS, Row, compare, config, figures, measure, model_flops, peaks


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "cards", list)
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    bench_gpu.main()
    assert capsys.readouterr().out == "not measured: this machine has no NVIDIA GPU\n"


def test_rows_cover_what_was_asked():
    train = [row for row in ROWS.values() if row.kind == "train"]
    assert {(row.preset, row.tokens) for row in train} == {
        (f"Qwen2-{size}", tokens) for size in ("0.5B", "1.5B", "7B") for tokens in (4096, 32768)}
    assert all(config(row).layers == (row.layers or config(row).layers) for row in ROWS.values())
    assert any(row.kind == "decode" and row.new for row in ROWS.values())


def test_flops_of_a_step():
    """By hand: Qwen2-1.5B has 1,543,714,304 parameters, the head's table counted once; 28 layers of 12 heads of 128."""
    row = Row("train", "Qwen2-1.5B", batch=2, tokens=4096)
    assert model_flops(row) == 2 * 4096 * (6 * 1_543_714_304 + 12 * 28 * 12 * 128 * 2048)


def test_peaks():
    assert peaks("NVIDIA H200") == (989e12, 4.8e12) and peaks("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert peaks("NVIDIA L40S") == (362e12, 0.864e12), "not an L4"
    assert peaks("NVIDIA GeForce GTX 1080") is None


@pytest.mark.parametrize("code, expected", [
    ("print('noise'); print('{\"seconds\": 2}')", {"seconds": 2}),
    ("import time; time.sleep(60)", {"error": "out of time (2 s)"}),
    ("raise SystemExit('JAX sees no GPU')", {"error": "JAX sees no GPU"}),
    ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate')", {"error": "out of memory"}),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", {"error": "out of memory"}),
    ("import os; os._exit(7)", {"error": "ended with status 7"}),
])
def test_a_side_that_fails_says_why(code, expected):
    assert measure([sys.executable, "-c", code], 2 if "sleep" in code else 60) == expected


def test_a_line(monkeypatch):
    """Half a second for 4 x 4096 tokens and one for theirs."""
    results = {"ours": {"seconds": 0.5, "peak_memory_gib": 10.0}, "transformers": {"seconds": 1.0,
                                                                                   "peak_memory_gib": 20.0}}
    monkeypatch.setattr(bench_gpu, "measure", lambda command, seconds: results[command[-2]])
    line = json.loads(json.dumps(compare("train_0.5b_4k", "NVIDIA H200", 60)))
    assert line["ratio"] == 2 and line["ours"]["tokens_per_second"] == 32768 and line["card"] == "NVIDIA H200"
    assert line["ours"]["mfu"] == pytest.approx(model_flops(ROWS["train_0.5b_4k"]) / 0.5 / 989e12, abs=1e-4)
    results["transformers"] = {"error": "out of memory"}
    line = compare("train_0.5b_4k", "an unknown card", 60)
    assert line["ratio"] is None and line["transformers"] == {"error": "out of memory"} and line["ours"]["mfu"] is None


def test_decoding_is_judged_by_bandwidth():
    row = ROWS["decode_1.5b_b8"]
    found = figures(row, {"seconds": 0.004, "weight_bytes": 4.8e9, "peak_memory_gib": 5}, peaks("NVIDIA H200"))
    assert found["tokens_per_second"] == 2000 and found["bandwidth_share"] == 0.25


def test_a_worker_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "-m", "tools.bench_gpu_worker", "ours", "decode_1.5b_b1"],
                          capture_output=True, text=True, cwd=bench_gpu.ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("JAX sees no GPU: its devices are cpus")
