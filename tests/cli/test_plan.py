"""`qwen2-jax plan`: flags, refusals, and the run on this machine's devices."""

from __future__ import annotations

import json
import signal

import pytest

from qwen2_jax.cli import plan as cli_plan
from qwen2_jax.plan import plan, topology

TINY = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64,
    "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": 96, "eos_token_id": 9, "torch_dtype": "float32",
    "use_sliding_window": False, "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.mark.parametrize(("flags", "message"), [
    ((), "needs --topology"),
    (("--topology", "v5q-8"), "did you mean v5p-8"),
    (("--topology", "v5p-7"), "number counts cores"),
    (("--topology", "v5e-4", "--seq", "0"), "--seq must lie between 1 and"),
    (("--topology", "v5e-4", "--batch", "-1"), "--batch must lie between 1 and"),
    (("--topology", "v5e-4", "--run", "0"), "--run must lie between 1 and"),
    (("--topology", "v5e-4", "--mode", "serve"), "choose from train, prefill, decode"),
    (("--topology", "v5e-4", "--remat", "some"), "choose from full, attention, dots, none"),
    (("--topology", "v5e-4", "--quant", "int8"), "--quant int8 is for --mode prefill and decode"),
    (("--topology", "v5e-4", "--mode", "decode", "--remat", "full"), "--remat is for --mode train"),
    (("--hlo", "out.txt", "--run", "1"), "--hlo needs --topology"),
    (("--topolgy", "v5e-4"), "did you mean --topology"),
    (("--run", "1", "--mesh", "auto"), "--mesh auto needs --topology"),
    (("--run", "1", "--mesh", "fsdp=3", "--batch", "4", "--seq", "16"), "4 rows cannot be split over 3 devices"),
    (("--run", "1", "--mesh", ","), "mesh ',' names no axis"),
    (("--topology", "v5e-4", "--hlo", "/nowhere/text"), "cannot write /nowhere/text: No such file or directory"),
    (("--topology", "v5e-4", "--hlo", "."), "it is a folder; name a file"),
    (("--topology", "v5e:32x32"), "topology 'v5e:32x32' is larger than v5e has"),
    (("--run", "1", "--seq", "65"), "beyond the model's context of 64"),
])
def test_refusals(call, folder, flags, message):
    done = call("plan", folder, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_without_libtpu(call, folder, monkeypatch):
    monkeypatch.setattr(topology, "libtpu_version", lambda: None)
    done = call("plan", folder, "--topology", "v5e-4")
    assert done.returncode == 2 and 'pip install "qwen2_jax[tpu]"' in done.stderr


def test_a_mesh_that_is_too_large(call, folder):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
    done = call("plan", folder, "--topology", "v5e:2x2", "--mesh", "fsdp=8")
    assert done.returncode == 2 and "mesh 'fsdp=8' needs 8 devices, v5e:2x2 has 4" in done.stderr


def test_a_topology_that_libtpu_refuses(call, folder):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
    done = call("plan", folder, "--topology", "v5e:3x5")
    assert done.returncode == 2 and "refuses the topology 'v5e:3x5'" in done.stderr and "v5e:4x4" in done.stderr


def test_an_unknown_model(call):
    done = call("plan", "Qwen2-8B", "--topology", "v5e-4")
    assert done.returncode == 2 and "did you mean Qwen2-7B" in done.stderr


NAMES = ("model topology chips devices mesh mode seq batch argument_bytes temp_bytes peak_bytes hbm_bytes fits "
         "compiled collectives model_flops_per_device fusion_seconds kernel_seconds exposed_collective_seconds "
         "predicted_seconds predicted_mfu compile_seconds versions").split()
"""Fields of `--json`, which others script against."""


@pytest.mark.optax
def test_what_does_not_fit_is_an_answer(call, folder):
    """Activations of a million rows; the compiler says so within seconds."""
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
    text = folder / "program.txt"
    done = call("plan", folder, "--topology", "v5e-1", "--seq", "64", "--batch", 2**20, "--hlo", text)
    assert done.returncode == 0, done.stderr
    for part in ("does not fit: needs ", " of 15.75 GiB a device (arguments 1.25)", "largest buffers",
                 "smallest mesh that fits: ", "estimated, not compiled"):
        assert part in done.stdout
    assert done.stderr.splitlines()[-1] == (f"qwen2-jax: {text} is not written: the program does not fit, so there is "
                                            "no text of it")
    assert list(folder.iterdir()) == [folder / "config.json"]


@pytest.mark.optax
@pytest.mark.parametrize("asked", [
    ("Qwen2-1.5B", "--seq", 1024),      # parameters of twelve bytes
    ("Qwen2-7B", "--mode", "decode", "--seq", 32768, "--batch", 2**20),     # to trace it alone would take minutes
])
def test_arguments_that_do_not_fit_are_answer_enough(call, monkeypatch, asked):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform, or the extra `tpu` is not installed")
    monkeypatch.setattr(plan, "compile_for_tpu", None)
    done = call("plan", *asked, "--topology", "v5e-1")
    assert done.returncode == 0, done.stderr
    assert "does not fit: needs more than " in done.stdout and "largest buffers" in done.stdout
    assert " of 15.75 GiB a device (arguments alone; not compiled)" in done.stdout
    found = json.loads(call("plan", *asked, "--topology", "v5e-1", "--json").stdout)
    assert list(found) == NAMES
    assert (found["fits"], found["compiled"], found["predicted_seconds"], found["collectives"]) == (
        False, False, None, None)
    assert found["peak_bytes"] == found["argument_bytes"]
    assert found["peak_bytes"] > found["hbm_bytes"] and found["argument_bytes"] > 12 * 1.5e9


@pytest.mark.optax
@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_a_run_on_the_devices_that_are_here(call, folder, mode):
    done = call("plan", folder, "--mode", mode, "--run", "2", "--mesh", "data=2", "--batch", "2", "--seq", "16",
                "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("measured ") and "median of 2" in first and first.endswith(" on 2 x cpu, mesh data=2")
    assert second == "no prediction: --topology names the slice to compare with"


@pytest.mark.optax
def test_a_run_as_json(call, folder):
    done = call("plan", folder, "--run", "1", "--mesh", "data=2", "--batch", "2", "--seq", "16", "--dtype", "float32",
                "--json")
    found = json.loads(done.stdout)
    assert found.pop("measured_seconds") > 0
    assert found == {"measured_on": "cpu", "measured_devices": 2, "measured_mesh": "data=2"}


def test_the_compiler_can_be_interrupted():
    """It holds Python back for minutes, whose own handlers would wait for it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with cli_plan._ends_at_once():
            assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL, signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert [signal.getsignal(number) for number in numbers] == before
