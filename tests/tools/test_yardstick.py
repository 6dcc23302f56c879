"""The comparison with MaxText, on a stand-in for its interpreter that writes small handmade programs."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qwen2_jax.plan.chips import CHIPS, GIB
from qwen2_jax.presets import PRESETS
from tests.plan.texts import MS, cycles, module
from tools import yardstick
from tools.yardstick import CASES, compared, kept, main, maxtext, maxtext_settings

CASE = CASES["7b_v5e-16_b1"]
PLACES = [[x, y, 0, 0] for x in range(4) for y in range(4)]
SIZE = 4 * 45_000_000
"""Bytes of a gathered buffer that takes three milliseconds over a line of four."""
TEXT = module("", f"""  %shard = bf16[{SIZE // 8}]{{0}} parameter(1)
  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%sum, {cycles(5 * MS)}
  %g = bf16[{SIZE // 2}]{{0}} all-gather(%shard), replica_groups=[4,4]<=[16], dimensions={{0}}""")
REPORT = {"mesh": {"fsdp": 4, "tensor": 4}, "places": PLACES, "argument_bytes": 5, "temp_bytes": 6, "peak_bytes": 10}
FULL = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.")


@pytest.fixture(autouse=True)
def no_libtpu(monkeypatch):
    devices = [SimpleNamespace(id=i, coords=place[:3], core_on_chip=0) for i, place in enumerate(PLACES)]
    monkeypatch.setattr(yardstick, "tpu_devices", lambda topology: devices)


@pytest.fixture
def interpreter(tmp_path):
    """Makes an executable that stands for MaxText's Python: it writes this report and program, or nothing at all."""
    def make(report: dict | None, text: str = TEXT) -> str:
        program = tmp_path / "maxtext-python"
        program.write_text(f"""#!{sys.executable}
import json, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit({report!r} is None)
worker, out, topology, devices, *settings = sys.argv[1:]
if {report!r} is None:
    sys.exit("ModuleNotFoundError: No module named 'maxtext'")
assert worker.endswith("yardstick_maxtext.py") and (topology, devices) == ("v5e:4x4", "16"), sys.argv
assert "max_target_length=4096" in settings and "ici_fsdp_parallelism=16" in settings, settings
pathlib.Path(out + ".json").write_text(json.dumps({report!r}))
pathlib.Path(out + ".hlo").write_text({text!r})
""")
        program.chmod(0o755)
        return str(program)

    return make


def test_a_program_is_read_as_ours_is(interpreter):
    found = maxtext(CASE, "no rings", interpreter(REPORT), 60)
    assert found.pop("score") == pytest.approx(8e-3)
    assert found.pop("fusion_seconds") == pytest.approx(5e-3)
    assert found.pop("exposed_collective_seconds") == pytest.approx(3e-3)
    assert found == {"fits": True, "kernel_seconds": 0, "argument_bytes": 5, "peak_bytes": 10, "all_reduce_bytes": 0}


def test_what_does_not_compile(interpreter):
    assert maxtext(CASE, "rings", interpreter({"error": FULL}), 60) == {
        "fits": False, "peak_bytes": pytest.approx(18.5 * GIB)}
    assert maxtext(CASE, "rings", interpreter({"error": "INTERNAL: no"}), 60) == {"error": "INTERNAL: no"}
    assert "No module named 'maxtext'" in maxtext(CASE, "rings", interpreter(None), 60)["error"]


def test_settings_are_the_presets_sizes():
    dense, sparse = (dict(s.split("=") for s in maxtext_settings(PRESETS[name]))
                     for name in ("Qwen2-72B", "Qwen2-57B-A14B"))
    assert (dense["model_name"], dense["logits_via_embedding"]) == ("qwen2.5-7b", "false")
    assert (dense["base_emb_dim"], dense["base_num_decoder_layers"], dense["base_num_kv_heads"]) == ("8192", "80", "8")
    assert (sparse["num_experts"], sparse["num_experts_per_tok"], sparse["base_moe_mlp_dim"]) == ("64", "8", "2560")


def test_the_better_variant_is_the_yardstick():
    side = {"fits": True, "peak_bytes": 10}
    sides = {"ours": {**side, "score": 1.8, "peak_bytes": 9}, "rings": {**side, "score": 3.0},
             "no rings": {**side, "score": 2.0}, "tensor 4": {"fits": False, "peak_bytes": 20}}
    line = compared(CASE, sides)
    assert (line["score_ratio"], line["peak_ratio"], line["case"]) == (0.9, 0.9, "7b_v5e-16_b1")
    for without in ({"ours": {"fits": False, "peak_bytes": 20}, "rings": sides["rings"]}, {"ours": sides["ours"]}):
        assert (compared(CASE, without)["score_ratio"], compared(CASE, without)["peak_ratio"]) == (None, None)


def test_results_are_kept_but_not_that_time_ran_out(tmp_path):
    path = tmp_path / "case.json"

    def late():
        raise subprocess.TimeoutExpired("maxtext", 7)

    assert kept(path, late) == {"error": "compiling took more than 7 seconds"}
    assert kept(path, lambda: {"score": 1.0}) == {"score": 1.0} == kept(path, late)


def test_cases_are_those_of_every_size_and_slice():
    assert len(CASES) == 4 * (5 + 3 + 3)
    for case in CASES.values():
        assert case.slice.partition("-")[0] in CHIPS


def test_an_interpreter_without_maxtext(tmp_path, monkeypatch, capsys, interpreter):
    monkeypatch.setattr(yardstick, "ours", None)
    for python, why in ((tmp_path / "none", "cannot be run: No such file or directory"),
                        (tmp_path, "cannot be run: Permission denied"),
                        (interpreter(None), "has no MaxText: it must be the Python of an environment with maxtext"),
                        (sys.executable, "has no MaxText")):
        monkeypatch.setattr(sys, "argv", ["yardstick", "--maxtext", str(python), "--cache", str(tmp_path / "kept")])
        assert main() == 2
        said = capsys.readouterr().err
        assert said.startswith(f"yardstick: --maxtext {python} {why}") and said.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_what_the_machine_lacks_is_not_kept(tmp_path, monkeypatch, capsys):
    said = "qwen2-jax: error: compiling for TPUs needs libtpu"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, "", said))
    monkeypatch.setattr(sys, "argv", ["yardstick", "--cases", CASE.name, "--cache", str(tmp_path)])
    assert main() == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "yardstick: plan Qwen2-7B --topology v5e-16: compiling for TPUs needs libtpu\n"


def test_the_command(tmp_path, monkeypatch, capsys, interpreter):
    ours = {"fits": True, "score": 4e-3, "peak_bytes": 9}
    monkeypatch.setattr(yardstick, "ours", lambda case, seconds: ours)
    monkeypatch.setattr(sys, "argv", ["yardstick", "--maxtext", interpreter(REPORT), "--cases", CASE.name, "--cache",
                                      str(tmp_path / "kept")])
    main()
    line = json.loads(capsys.readouterr().out)
    assert (line["score_ratio"], line["peak_ratio"], line["no rings"]["fits"]) == (0.5, 0.9, True)
    monkeypatch.setattr(sys, "argv", ["yardstick", "--cases", "7b"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "'7b' is none of 7b_v5e-16_b1" in capsys.readouterr().err
