"""Training, generation and scoring in several processes, as on the hosts of a pod, give what one device gives."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.pod import serving
from tests.serve.models import write_checkpoint, write_tokenizer
from tools.sameness import MODELS, TOLERANCE, Outcome, beyond, difference

CASES = ((2, "dense", "fsdp=2x2,tensor=2"), (2, "moe untied", "data=2,expert=4"),
         (4, "dense untied", "data=2,tensor=4"), (4, "moe", "fsdp=4,context=2"))

pytestmark = [pytest.mark.slow, pytest.mark.optax]


@pytest.mark.parametrize("processes, model, mesh", CASES)
def test_as_on_one_device(process_env, tmp_path, processes, model, mesh):
    file = tmp_path / "outcome"
    launch(process_env, processes, 8 // processes, "tools.sameness", "--model", model, "--mesh", mesh, "--save", file)
    found = difference(MODELS[model], mesh, Outcome(*pickle.loads(file.read_bytes())))
    assert beyond(found) == []


def launch(process_env, processes, devices, *module):
    done = subprocess.run(
        [sys.executable, "-m", "tools.launch_local", "-n", str(processes), "--devices", str(devices), "--",
         sys.executable, "-m", *map(str, module)],
        cwd=ROOT, env=process_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_writes_once(process_env, tmp_path):
    """Process 0 writes, what one process writes; without --mesh the processes are told to share the work."""
    folder = write_checkpoint(tmp_path, "dense", write_tokenizer(tmp_path / "tokenizer"))
    said = {}
    for name, mesh in (("one", []), ("two", ["--mesh", "data=2,tensor=2"])):
        argv = ["qwen2_jax", "generate", "--model", folder, "--prompt", "a b", "--prompt", "import", "--temperature", 0,
                "--max-new-tokens", 6, "--output", tmp_path / name, *mesh]
        launch(process_env, 1 if name == "one" else 2, 2, *argv)
        said[name] = (tmp_path / name).read_text()
    assert said["one"] == said["two"] and said["one"].count("\n") == 2
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(AssertionError, match="2 processes were started: --mesh must say how they share the work"):
        launch(process_env, 2, 2, "qwen2_jax", "generate", "--model", folder, "--prompt", "a")


def test_every_process_hears_the_same(process_env, tmp_path):
    """Drawn with and without a seed, scored; one process's clock runs a hundred times as fast; other requests are
    refused everywhere."""
    launch(process_env, 2, 2, "tests.pod.serving", "fsdp=2,tensor=2", tmp_path / "heard")
    first, second = (pickle.loads((tmp_path / f"heard.{n}").read_bytes()) for n in range(2))
    for name in ("greedy", "sampled", "fresh", "likelihoods", "refused"):
        assert first[name] == second[name], name
    assert first["refused"].startswith("processes 1 were given other requests than process 0")
    alone = serving.heard(None)
    assert alone["refused"] == ""
    for name in ("greedy", "sampled"):
        for (ids, logprobs), (expected_ids, expected) in zip(first[name], alone[name], strict=True):
            assert ids == expected_ids
            np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE.logprobs)
    for a, b, c in zip(first["logits"], second["logits"], alone["logits"], strict=True):
        assert np.array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=0, atol=TOLERANCE.logprobs)
    for (a, greedy), (b, expected_greedy) in zip(first["likelihoods"], alone["likelihoods"], strict=True):
        assert greedy == expected_greedy and abs(a - b) <= 32 * TOLERANCE.logprobs     # a sum of at most 31 tokens
