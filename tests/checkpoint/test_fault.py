import signal
import subprocess
import sys

import pytest

from qwen2_jax.checkpoint import fault
from qwen2_jax.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def armed_anew():
    fault.armed.cache_clear()
    yield
    fault.armed.cache_clear()


@pytest.mark.parametrize("value, reached", [("mid_write:2", 2), ("mid_write", 1), ("before_rename", 3)])
def test_dies_when_the_point_is_reached_for_that_time(value, reached):
    """With its whole process group, without a word."""
    points = ("from qwen2_jax.checkpoint.fault import reach\n"
              "for n in (1, 2, 3): print(n, flush=True); reach('mid_write')")
    done = subprocess.run([sys.executable, "-c", points], cwd=ROOT, env={fault.VARIABLE: value}, capture_output=True,
                          text=True, start_new_session=True)
    assert done.stdout.split() == [str(n) for n in range(1, reached + 1)] and done.stderr == ""
    assert done.returncode == (0 if value == "before_rename" else -signal.SIGKILL)


def test_unset_it_does_nothing(monkeypatch):
    monkeypatch.delenv(fault.VARIABLE, raising=False)
    for point in fault.POINTS:
        fault.reach(point)
    assert fault.armed() is None


@pytest.mark.parametrize("value", ["elsewhere", "mid_write:0", "mid_write:x", "mid_write:-1"])
def test_a_point_that_does_not_exist(monkeypatch, value):
    monkeypatch.setenv(fault.VARIABLE, value)
    with pytest.raises(UserError, match=f"{fault.VARIABLE}={value} is not POINT or POINT:COUNT"):
        fault.reach("mid_write")
