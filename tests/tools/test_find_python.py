"""What a fresh machine lacks is said in one sentence, by the script that `make` asks first."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"
FAKE = """#!/bin/sh
case "$2" in
*version_info*) {version} ;;
*ensurepip*) exit {no_venv} ;;
*) echo "$0" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A machine whose only Pythons are fakes: name → (version or None for a shim that refuses, has venv)."""
    tools = tmp_path / "bin with space"
    tools.mkdir()
    for name in ("sed", "sh"):
        (tools / name).symlink_to(shutil.which(name))

    def find(pythons: dict[str, tuple[str | None, bool]], *wanted: str, **env: str):
        for name, (version, has_venv) in pythons.items():
            path = tools / name
            answer = f"echo {version}" if version else "exit 127"
            path.write_text(FAKE.format(version=answer, no_venv=int(not has_venv)))
            path.chmod(0o755)
        return subprocess.run([shutil.which("sh"), SCRIPT, *wanted], text=True, capture_output=True,
                              env={"PATH": str(tools), "HOME": str(tmp_path)} | env)

    find.folder = tools
    return find


@pytest.mark.parametrize("pythons, wanted, found", [
    ({"python3": ("3.11", True)}, [], "python3"),
    ({"python3": ("3.13", True), "python3.12": ("3.12", True)}, [], "python3.12"),
    ({"python3": ("3.11", False), "python3.12": ("3.12", True)}, [], "python3.12"),      # the first has no venv
    ({"python3": ("3.11", True), "python3.12": (None, True)}, [], "python3"),
    ({"python3": ("3.11", True), "python3.12": ("3.12", True)}, ["3.12"], "python3.12"),
])
def test_the_first_that_will_do_is_found(machine, pythons, wanted, found):
    done = machine(pythons, *wanted)
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.folder / found == Path(done.stdout.strip())


@pytest.mark.parametrize("pythons, env, sentence", [
    ({"python3": ("3.11", False)}, {}, "Python 3.11 has no venv module: install it (Debian, Ubuntu: "
                                       "sudo apt install python3.11-venv)"),
    ({"python3": ("3.9", True)}, {}, "Found Python 3.9 (python3), but 3.11 or 3.12 is needed"),
    ({"python3": ("3.14", True)}, {}, "Found Python 3.14 (python3), but 3.11 or 3.12 is needed"),
    ({"python3.12": (None, True)}, {}, "No Python found: install Python 3.11 or 3.12"),
    ({"python3": ("3.11", True)}, {"PYTHON": "/gone/python"}, "PYTHON=/gone/python does not run"),
])
def test_what_is_missing_is_said_in_one_sentence(machine, pythons, env, sentence):
    done = machine(pythons, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_chosen_interpreter_wins(machine):
    done = machine({"python3": ("3.11", True), "mine": ("3.12", True)}, PYTHON=f"{machine.folder}{os.sep}mine")
    assert done.stdout.strip() == str(machine.folder / "mine")
