"""Training in several processes, as on the hosts of a pod, gives what one device gives."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools.sameness import MODELS, Outcome, beyond, difference

CASES = ((2, "dense", "fsdp=2x2,tensor=2"), (2, "moe untied", "data=2,expert=4"),
         (4, "dense untied", "data=2,tensor=4"), (4, "moe", "fsdp=4,context=2"))

pytestmark = [pytest.mark.slow, pytest.mark.optax]


@pytest.mark.parametrize("processes, model, mesh", CASES)
def test_as_on_one_device(process_env, tmp_path, processes, model, mesh):
    file = tmp_path / "outcome"
    done = subprocess.run(
        [sys.executable, "-m", "tools.launch_local", "-n", str(processes), "--devices", str(8 // processes), "--",
         sys.executable, "-m", "tools.sameness", "--model", model, "--mesh", mesh, "--save", str(file)],
        cwd=ROOT, env=process_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = difference(MODELS[model], mesh, Outcome(*pickle.loads(file.read_bytes())))
    assert beyond(found) == []
