"""Several processes as one command: their output, their failures, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.conftest import ROOT


def launch(*argv, script, **options):
    return subprocess.run([sys.executable, "-m", "tools.launch_local", *argv, "--", sys.executable, "-c", script],
                          cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_has_its_number_and_devices():
    script = ("import os; print(os.environ['QWEN2_JAX_PROCESS'], os.environ['QWEN2_JAX_PROCESSES'], "
              "os.environ['XLA_FLAGS'].split()[-1])")
    done = launch("-n", "3", "--devices", "2", script=script)
    assert done.returncode == 0 and not done.stderr
    flag = "--xla_force_host_platform_device_count=2"
    assert sorted(done.stdout.splitlines()) == [f"[{n}] {n} 3 {flag}" for n in range(3)]


def test_one_that_fails_stops_the_others():
    script = "import os, sys, time; sys.exit(7) if os.environ['QWEN2_JAX_PROCESS'] == '1' else time.sleep(50)"
    began = time.monotonic()
    done = launch("-n", "3", script=script)
    assert done.returncode == 7 and time.monotonic() - began < 20
    assert done.stderr == "launch_local: process 1 exited with status 7; the others were stopped\n"


def test_one_that_is_killed_stops_the_others_and_what_they_started(tmp_path):
    script = (f"import os, signal, subprocess, sys, time; n = os.environ['QWEN2_JAX_PROCESS']\n"
              f"child = subprocess.Popen(['sleep', '50']); open(r'{tmp_path}/' + n, 'w').write(str(child.pid))\n"
              "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
              f"while n == '2' and len(os.listdir(r'{tmp_path}')) < 3: time.sleep(0.05)\n"
              "time.sleep(0.2) if n == '2' else time.sleep(50)\n"
              "os.kill(os.getpid(), signal.SIGKILL)")
    done = launch("-n", "3", script=script)
    assert done.returncode == 128 + 9
    assert "process 2 was killed by SIGKILL; the others were stopped" in done.stderr
    pids = [int((tmp_path / str(n)).read_text()) for n in range(3)]
    assert not any(map(alive, pids))


def test_the_one_that_died_first_is_named(tmp_path):
    """Process 0 fails because process 1 has died, within a millisecond of it."""
    script = (f"import os, pathlib, signal; pid = pathlib.Path(r'{tmp_path}/pid')\n"
              "if os.environ['QWEN2_JAX_PROCESS'] == '1':\n"
              "    pid.with_name('new').write_text(str(os.getpid())); pid.with_name('new').rename(pid)\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n"
              "while not pid.exists(): pass\n"
              "stat = pathlib.Path(f'/proc/{pid.read_text()}/stat')\n"
              "while stat.read_text().rpartition(')')[2].split()[0] != 'Z': pass\n"
              "os._exit(3)")
    done = launch("-n", "2", script=script)
    assert (done.returncode, done.stderr) == (
        128 + 9, "launch_local: process 1 was killed by SIGKILL; the others were stopped\n")


def test_a_terminated_launcher_leaves_nothing(tmp_path):
    script = (f"import os, subprocess, time; child = subprocess.Popen(['sleep', '50'])\n"
              f"name = r'{tmp_path}/' + os.environ['QWEN2_JAX_PROCESS']\n"
              "open(name + 'new', 'w').write(str(child.pid)); os.rename(name + 'new', name); time.sleep(50)")
    launcher = subprocess.Popen([sys.executable, "-m", "tools.launch_local", "-n", "2", "--", sys.executable, "-c",
                                 script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("[01]"))) < 2:
        time.sleep(0.02)
    launcher.terminate()
    assert launcher.communicate(timeout=20)[1] == "launch_local: stopping all\n" and launcher.returncode == 130
    assert not any(alive(int((tmp_path / n).read_text())) for n in "01")


def test_wrong_use():
    done = subprocess.run([sys.executable, "-m", "tools.launch_local", "-n", "2"], cwd=ROOT, capture_output=True,
                          text=True, env=dict(os.environ))
    assert done.returncode == 2 and "a command is needed behind --" in done.stderr
    done = subprocess.run([sys.executable, "-m", "tools.launch_local", "-n", "2", "--", "/no/such/program"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "cannot start /no/such/program" in done.stderr
    assert launch("-n", "0", script="").returncode == 2
