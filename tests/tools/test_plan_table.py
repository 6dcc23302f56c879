"""The table of plans: what is kept of a compilation, and what stops the work instead."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.plan.chips import GIB
from tools import plan_table
from tools.plan_table import Cell, compile_cell, kept, main, text

CELL = Cell("Qwen2-0.5B", "v5e-8", "decode")
PLAN = {"fits": True, "mesh": "data=8", "peak_bytes": 2 * GIB, "predicted_seconds": 0.01, "predicted_mfu": 0.1}
NO_LIBTPU = "compiling for TPUs needs libtpu, which is not installed: pip install \"qwen2_jax[tpu]\""


@pytest.fixture
def ends(monkeypatch):
    """`ends(2, stderr="…")`: how every `qwen2-jax plan` of this test ends."""
    def make(status, stdout="", stderr=""):
        monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, stdout,
                                                                                                stderr))
    return make


def test_a_plan_is_kept(tmp_path, ends):
    ends(0, json.dumps(PLAN))
    compile_cell(CELL, tmp_path, 60)
    assert kept(CELL, tmp_path) == PLAN and text(CELL, tmp_path) == "`data=8` 2.0 GiB, 10 ms a token"


@pytest.mark.parametrize("status, said", [
    (1, "qwen2-jax: bug: XlaRuntimeError at compiler.py:1: INTERNAL: no"),
    (2, "qwen2-jax: error: the program cannot be priced: no price of custom call 'x'"),
    (2, "qwen2-jax: error: the program does not compile: it needs 20M of the memory space vmem"),
    (-6, "F1123 target.cc:1737] Check failed"),
])
def test_what_does_not_compile_is_kept(tmp_path, ends, status, said):
    ends(status, stderr=f"qwen2-jax: compiling\n{said}\n")
    compile_cell(CELL, tmp_path, 60)
    assert kept(CELL, tmp_path) == {"failed": said} and "did not compile" in text(CELL, tmp_path)


@pytest.mark.parametrize("status, said, told", [
    (2, f"qwen2-jax: error: {NO_LIBTPU}", NO_LIBTPU),
    (2, "qwen2-jax: error: No space left on device", "No space left on device"),
    (-9, "", "it ended with status -9"),
])
def test_what_the_machine_lacks_is_not(tmp_path, ends, status, said, told):
    ends(status, stderr=said)
    with pytest.raises(UserError) as error:
        compile_cell(CELL, tmp_path, 60)
    assert str(error.value) == f"plan Qwen2-0.5B --topology v5e-8: {told}" and not list(tmp_path.iterdir())


def test_a_plan_of_arguments_alone_is_a_bound(tmp_path, ends):
    ends(0, json.dumps(PLAN | {"fits": False, "compiled": False, "peak_bytes": 20 * GIB}))
    compile_cell(CELL, tmp_path, 60)
    assert text(CELL, tmp_path) == "no: `data=8` needs ≥ 20.0 GiB"


def run(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(sys, "argv", ["plan_table", "--cache", str(tmp_path / "cache"), "--only", CELL.file,
                                      "--output", str(tmp_path / "table.md"), "--minutes", "1", *flags])
    return main()


def test_the_machines_failure_stops_the_work_in_a_sentence(tmp_path, monkeypatch, capsys, ends):
    ends(2, stderr=f"qwen2-jax: error: {NO_LIBTPU}")
    assert run(monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err == f"plan_table: plan Qwen2-0.5B --topology v5e-8: {NO_LIBTPU}\n"
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("flag", ["--output", "--cache"])
def test_folders_that_cannot_be_are_refused_before_anything_is_compiled(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr(plan_table, "compile_cell", None)
    (tmp_path / "file").touch()
    assert run(monkeypatch, tmp_path, flag, str(tmp_path / "file" / "x")) == 2
    said = capsys.readouterr().err
    assert said.startswith("plan_table: ") and "Not a directory" in said and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--minutes", "--cell-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon"])
def test_no_amount_of_time(tmp_path, monkeypatch, capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path, f"{flag}={value}")
    assert f"argument {flag}: " in capsys.readouterr().err
