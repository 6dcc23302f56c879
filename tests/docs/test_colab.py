"""The cells of docs/colab.md, run in order as a notebook would, with a tiny model on CPU devices."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.models import write_checkpoint, write_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "colab.md"
DEVICES = {"v5e-1": 1, "v2-8": 8}
COMMAND = 'subprocess.run({line}, shell=True, check=True)'


def cells() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def as_script(cell: str) -> str:
    """A notebook's lines in plain Python: `!` runs a command, in which {NAME} stands for a variable. Nothing is
    installed, and planning needs libtpu."""
    lines = []
    for line in cell.splitlines():
        if line.startswith("%pip install"):
            line = f"print('not installed anew:', {line.partition(' ')[2]!r})"
        elif line.startswith("!"):
            command = line[1:].replace("qwen2-jax", f"{sys.executable} -m qwen2_jax")
            if line.startswith("!qwen2-jax plan") and importlib.util.find_spec("libtpu") is None:
                command = "echo skipped, there is no libtpu: " + line[1:]
            line = COMMAND.format(line=f"f{command!r}")
        lines.append(line)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colab")
    tiny = write_checkpoint(folder / "tiny", "dense", write_tokenizer(folder / "tokenizer"))
    config = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (tiny / "config.json").write_text(json.dumps(config))
    return tiny


@pytest.mark.slow
@pytest.mark.parity     # transformers writes the checkpoint
@pytest.mark.parametrize("runtime", DEVICES)
def test_the_cells_run(runtime, model, process_env, tmp_path):
    script = "import subprocess\n" + "\n".join(map(as_script, cells()))
    flags = f"{process_env['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES[runtime]}"
    paths = os.pathsep.join(filter(None, (process_env["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
    env = process_env | {"MODEL": str(model), "RUNTIME": runtime, "XLA_FLAGS": flags, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = re.search(r"> Why is the sky blue\?\n(.*)\n> And at sunset\?\n(.*)", done.stdout, re.DOTALL)
    assert answers and all(answer.strip() for answer in answers.groups())
    assert (tmp_path / "model" / "params").is_dir()
    planned = "skipped, there is no libtpu" if importlib.util.find_spec("libtpu") is None else "fits: needs"
    assert done.stdout.count(planned) == 2


def test_the_page_is_what_the_test_runs():
    assert len(cells()) == 4 and cells()[0].startswith("%pip install")
    assert sum(cell.count("\n!") + cell.startswith("!") for cell in cells()) == 3
    assert all(runtime in PAGE.read_text() for runtime in ("v5e-1", "v6e-1", "v2-8"))
