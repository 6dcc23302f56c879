"""The launcher for pods: the commands it prints, and what it does with a `gcloud` that runs workers on this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.tools.test_launch_local import alive
from tools import launch_pod
from tools.launch_pod import main
from tools.pod_commands import Pod, worker_count

POD = ("my-pod", "--zone", "us-west4-a", "--type", "v5litepod-16")

# Workers are folders; what gcloud would run on them runs here, with such a folder for a home. Each call is noted.
GCLOUD = """\
import json, os, pathlib, subprocess, sys
state = pathlib.Path(os.environ["FAKE_GCLOUD"])
group, verb, *rest = sys.argv[3:]
flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
words = [word for word in rest if not word.startswith("--")]
with (state / "calls").open("a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
made = state / "made"
if (group, verb) == ("queued-resources", "describe"):
    if not made.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: no such resource")
    waiting = made.read_text().split()
    print(waiting[0])
    if len(waiting) > 1:
        made.write_text(" ".join(waiting[1:]))
elif (group, verb) == ("queued-resources", "create"):
    made.write_text(os.environ.get("FAKE_STATES", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE"))
elif (group, verb) == ("queued-resources", "delete"):
    made.unlink()
elif (group, verb) == ("tpu-vm", "describe"):
    if not made.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: no such node")
    number = words[0][-1] if words[0][-1].isdigit() else 0
    addresses = [f"10.0.{number}.{n}" for n in range(2)]
    value = flags["format"].startswith("value(")
    print(addresses[0] if value else json.dumps({"networkEndpoints": [{"ipAddress": a} for a in addresses]}))
elif verb in ("ssh", "scp"):
    status = 0
    for n in range(2) if flags["worker"] == "all" else [int(flags["worker"])]:
        home = state / words[-1].partition(":")[0] / str(n)
        home.mkdir(parents=True, exist_ok=True)
        if verb == "scp":
            (home / words[-1].partition(":")[2]).write_bytes(pathlib.Path(words[0]).read_bytes())
        else:
            env = os.environ | {"HOME": str(home), "PATH": f"{state}/bin:{os.environ['PATH']}"}
            status = subprocess.run(["sh", "-c", flags["command"]], cwd=home, env=env).returncode or status
    sys.exit(status)
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """The folder of a made-up cloud; `calls()` are the arguments that its gcloud was called with."""
    folder = tmp_path / "cloud"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/gcloud").write_text(f"#!{sys.executable} -S\n{GCLOUD}")
    (folder / "bin/gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))
    monkeypatch.setattr(launch_pod, "POLL", 0.01)
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # the test process keeps its own
    return folder


@pytest.fixture
def there(gcloud):
    """The same, with an active slice of two workers on which the project is installed."""
    (gcloud / "made").write_text("ACTIVE")
    for slice_ in ("my-pod", "my-pod-0", "my-pod-1"):
        for n in range(2):
            (gcloud / slice_ / str(n) / "qwen2_jax_pod").mkdir(parents=True)
    return gcloud


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_commands_of_one_slice(capsys):
    assert main([*POD, "--project", "my-project", "--create", "--install", "--delete", "--dry-run", "--env", "A=b c",
                 "--", "qwen2-jax", "generate", "--prompt", "it's $HOME"]) == 0
    lines = capsys.readouterr().out.splitlines()
    where = "--zone=us-west4-a --project=my-project"
    state = f"gcloud compute tpus queued-resources describe my-pod {where} '--format=value(state.state)'"
    assert lines[:4] == [
        "set -e", f"give_back() {{ gcloud compute tpus queued-resources delete my-pod {where} --force --quiet; }}",
        "trap give_back EXIT", "trap 'exit 130' INT TERM"]
    del lines[1:4]
    assert lines[:3] == [
        "set -e",
        f"{state} || gcloud compute tpus queued-resources create my-pod {where} --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-id=my-pod",
        f"while state=$({state}); do"]
    del lines[3:9]      # the loop's body and the end's test
    assert lines[3] == f"git -C {ROOT} archive --format=tar.gz --output=/tmp/qwen2_jax.tar.gz HEAD"
    assert lines[4] == ("gcloud compute tpus tpu-vm scp /tmp/qwen2_jax.tar.gz my-pod:qwen2_jax.tar.gz "
                        f"{where} --worker=all")
    assert lines[5].startswith(f"gcloud compute tpus tpu-vm ssh my-pod {where} --worker=all '--command=rm -rf ")
    assert lines[6] == (f"COORDINATOR=$(gcloud compute tpus tpu-vm describe my-pod {where} "
                        "'--format=value(networkEndpoints[0].ipAddress)')")
    starts = [line for line in lines if "--worker=all" not in line and " ssh " in line]
    assert len(starts) == 4
    for n, line in enumerate(starts):
        assert line.endswith(' & workers="$workers $!"')
        # As a shell would take it apart, three times over: ours, the worker's, and the one of the session.
        words = shlex.split(line.rpartition(" & ")[0].replace('"$COORDINATOR"', "10.1.2.3"))
        assert words[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-pod", "--zone=us-west4-a",
                              "--project=my-project", f"--worker={n}"]
        remote = shlex.split(words[-1].removeprefix("--command="))
        assert remote[:4] == ["setsid", "--wait", "bash", "-c"] and len(remote) == 5
        assert shlex.split(remote[4].partition(" env ")[2].partition("; status=")[0]) == [
            "QWEN2_JAX_COORDINATOR=10.1.2.3:8476", "QWEN2_JAX_PROCESSES=4", f"QWEN2_JAX_PROCESS={n}", "A=b c",
            "qwen2-jax", "generate", "--prompt", "it's $HOME"]


def test_the_commands_of_two_slices(capsys):
    assert main(["p", "--zone", "z", "--type", "v5p-16", "--slices", "2", "--spot", "--create", "--dry-run", "--",
                 "date"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --node-count=2 "
                             "--node-prefix=p --spot")
    starts = [line for line in lines if line.endswith("$!\"")]
    assert [(line.split()[5], line.split()[7]) for line in starts] == [
        ("p-0", "--worker=0"), ("p-0", "--worker=1"), ("p-1", "--worker=0"), ("p-1", "--worker=1")]
    assert all(f"QWEN2_JAX_PROCESSES=4 QWEN2_JAX_PROCESS={n} date" in line for n, line in enumerate(starts))


def test_the_printed_script_does_what_it_says(there, capsys):
    """Run by a shell, the dry run starts every worker with process 0's address and the words that were given."""
    script = 'echo "$QWEN2_JAX_COORDINATOR $QWEN2_JAX_PROCESS $1" > said'
    argv = ["sh", "-c", script, "x", "a'b \"$HOME\" ; exit 3 `id`"]
    assert main(["my-pod", "--zone", "z", "--type", "v2-16", "--create", "--dry-run", "--", *argv]) == 0
    subprocess.run(["sh", "-c", capsys.readouterr().out], check=True, timeout=60)
    for n in range(2):
        assert (there / f"my-pod/{n}/qwen2_jax_pod/said").read_text() == f"10.0.0.0:8476 {n} {argv[-1]}\n"


def printed_script(capsys, *argv):
    """What becomes of the dry run, run by a shell."""
    assert main(["my-pod", "--zone", "z", "--type", "v2-16", "--dry-run", *argv]) == 0
    return subprocess.run(["sh", "-c", capsys.readouterr().out], capture_output=True, text=True, timeout=60)


def test_the_printed_script_tells_of_workers_that_fail(there, capsys):
    script = 'exit $((QWEN2_JAX_PROCESS * 7))'
    done = printed_script(capsys, "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (7, "worker 1 exited with status 7\n")
    assert printed_script(capsys, "--delete", "--", "sh", "-c", script).returncode == 7
    assert not (there / "made").exists(), "given back all the same"


@pytest.mark.parametrize("states, state", [("FAILED", "FAILED"), ("WAITING_FOR_RESOURCES SUSPENDED", "SUSPENDED")])
def test_the_printed_script_waits_for_no_slice_that_will_never_be(gcloud, monkeypatch, capsys, states, state):
    monkeypatch.setenv("FAKE_STATES", states)
    done = printed_script(capsys, "--create", "--", "true")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"my-pod is {state}; to start anew give it back with --delete")
    assert not [call for call in calls(gcloud) if call[3] == "ssh"]


@pytest.mark.parametrize("argv, message", [
    (["p", "--zone", "z", "--type", "v5litepod-512", "--create"],
     "'v5litepod-512' does not exist: the largest slice is v5litepod-256"),
    (["p", "--zone", "z", "--type", "v5p-99999", "--create"], "the largest slice is v5p-12288"),
    (["p", "--zone", "z", "--type", "v5p-" + 5000 * "9", "--create"], "9' is not an accelerator type: v2, v3"),
    (["--zone", "z", "--type", "v5p-8", "--create"], "arguments are required: name"),
    (["p", "--type", "v5p-8", "--create"], "arguments are required: --zone"),
    (["p", "--zone", "z", "--type", "v5p-8"], "nothing to do"),
    (["p", "--zone", "z", "--type", "v5e-16", "--create"], "--type 'v5e-16' is not an accelerator type: v2, v3"),
    (["p", "--zone", "z", "--type", "tpu7x-8", "--create"], "rented through GKE, see tools/pods/xpk.sh"),
    (["p", "--zone", "z", "--type", "v5p-8", "--slices", "0", "--create"], "--slices must be at least 1"),
    (["p", "--zone", "z", "--type", "v5p-8", "--port", "0", "--create"], "--port must lie between"),
    (["p;id", "--zone", "z", "--type", "v5p-8", "--create"], "the name must be lower-case letters"),
    (["p", "--zone=--x", "--type", "v5p-8", "--create"], "--zone must be lower-case letters"),
    (["p", "--zone", "z", "--type", "v5p-8", "--spot", "--reserved", "--create"], "exclude one another"),
    (["p", "--zone", "z", "--type", "v5p-8", "--env", "A", "--create"], "--env takes NAME=VALUE, found 'A'"),
    (["p", "--zone", "z", "--type", "v5p-8", "--env", "A;id=1", "--create"], "--env takes NAME=VALUE"),
    (["p", "--zone", "z", "--type", "v5p-8", "--env", "QWEN2_JAX_PROCESS=1", "--create"], "is set by the launcher"),
    (["p", "--zone", "z", "--type", "v5p-8", "date"], "unrecognized arguments: date"),
    (["p", "--zone", "z", "--type", "v5p-8", "--creat"], "unrecognized arguments: --creat"),
])
def test_wrong_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name, hosts", [
    ("v2-8", 1), ("v3-32", 4), ("v4-16", 2), ("v5litepod-1", 1), ("v5litepod-8", 1), ("v5litepod-16", 4),
    ("v5litepod-256", 64), ("v5p-8", 1), ("v5p-128", 16), ("v6e-8", 1), ("v6e-16", 4),
])
def test_hosts_of_a_slice(name, hosts):
    assert worker_count(name) == hosts


def test_create_waits_and_takes_what_is_there(gcloud, capsys):
    assert main([*POD, "--create"]) == 0
    verbs = [call[3] for call in calls(gcloud)]
    assert verbs == ["describe", "create", "describe", "describe", "describe"]
    assert "my-pod is WAITING_FOR_RESOURCES" in capsys.readouterr().err
    assert main([*POD, "--create"]) == 0
    assert [call[3] for call in calls(gcloud)].count("create") == 1


def test_a_slice_that_was_taken_away(gcloud, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_STATES", "SUSPENDED")
    assert main([*POD, "--create"]) == 2
    assert "launch_pod: my-pod is SUSPENDED; to start anew give it back with --delete" in capsys.readouterr().err


def test_install_copies_the_last_commit(there, capsys):
    """Up to the point where the workers' pip would reach for the network: theirs fails here."""
    (there / "bin/python3").write_text("#!/bin/sh\nexit 9\n")
    (there / "bin/python3").chmod(0o755)
    assert main([*POD, "--install"]) == 2
    assert "ended with status 9" in capsys.readouterr().err
    for n in range(2):
        assert (there / f"my-pod/{n}/qwen2_jax_pod/pyproject.toml").exists()


def test_every_worker_runs_the_command(there, capfd):
    script = 'echo "$QWEN2_JAX_COORDINATOR $QWEN2_JAX_PROCESSES $QWEN2_JAX_PROCESS $1"'
    assert main([*POD, "--slices", "2", "--port", "99", "--", "bash", "-c", script, "x", "a 'b' $HOME"]) == 0
    said = sorted(capfd.readouterr().out.splitlines())
    assert said == [f"[{n}] 10.0.0.0:99 4 {n} a 'b' $HOME" for n in range(4)]
    assert not list(there.rglob("running"))     # nothing is left for --stop to find


def test_a_dying_worker_stops_the_others(there, capfd):
    """The others are stopped where they run, with what they started; the launcher ends as the dead one did."""
    script = ("echo $$ > ~/pid; sleep 60 & echo $! > ~/child; "
              'if [ "$QWEN2_JAX_PROCESS" = 0 ]; then wait; fi; '
              "while ! [ -s ../../0/child ]; do sleep 0.05; done; exit 7")
    began = time.monotonic()
    assert main([*POD, "--", "bash", "-c", script]) == 7
    assert time.monotonic() - began < 20
    assert "launch_pod: worker 1 exited with status 7; the others were stopped" in capfd.readouterr().err
    assert calls(there)[-1][-1].startswith("--command=group=$(cat qwen2_jax_pod/running")
    for n in range(2):
        assert not alive(int((there / f"my-pod/{n}/child").read_text()))
    assert not alive(int((there / "my-pod/0/pid").read_text()))


def test_slices_are_given_back_even_after_a_failure(there, capfd):
    assert main([*POD, "--delete", "--", "sh", "-c", "exit 5"]) == 5
    assert calls(there)[-1][2:5] == ["queued-resources", "delete", "my-pod"] and not (there / "made").exists()


def test_no_such_slice_and_no_gcloud(gcloud, capsys, monkeypatch):
    assert main([*POD, "--", "date"]) == 2
    assert "gcloud knows no slice my-pod: ERROR: (gcloud) NOT_FOUND: no such node; --create makes it" in (
        capsys.readouterr().err)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*POD, "--", "date"]) == 2
    assert "launch_pod: gcloud is not on the PATH" in capsys.readouterr().err


def test_the_files_for_others_name_what_exists():
    """SkyPilot's file has its fields; both run commands that exist, with meshes that parse."""
    import yaml

    from qwen2_jax.cli.parser import parse
    from qwen2_jax.sharding.mesh import parse_mesh

    task = yaml.safe_load((ROOT / "tools/pods/skypilot.yaml").read_text())
    assert set(task) <= {"name", "resources", "workdir", "envs", "setup", "run"} and task["workdir"] == "."
    kind, runtime = task["resources"]["accelerators"], task["resources"]["accelerator_args"]["runtime_version"]
    pod = Pod("p", "z", None, kind.removeprefix("tpu-"))
    assert f"--runtime-version={runtime}" in pod.create() and parse_mesh(task["envs"]["MESH"])
    [line] = [line for line in task["run"].splitlines() if line.startswith("qwen2-jax ")]
    assert parse(shlex.split(line)[1:]).command == "doctor"
    for shell, text in (("bash", task["setup"]), ("bash", task["run"]),
                        ("sh", (ROOT / "tools/pods/xpk.sh").read_text())):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_xpk_gets_the_command_as_it_was_given(tmp_path):
    xpk = tmp_path / "xpk"
    xpk.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    xpk.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "SLICES": "2"}
    done = subprocess.run(["tools/pods/xpk.sh", "echo", "it's $HOME"], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=True)
    flags = done.stdout.splitlines()
    assert flags[:3] == ["workload", "create", "--cluster=c"] and "--num-slices=2" in flags
    assert "--tpu-type=v5litepod-16" in flags
    assert shlex.split(flags[-1].rpartition("auto")[2]) == ["echo", "it's $HOME"]
    assert subprocess.run(["tools/pods/xpk.sh"], cwd=ROOT, env=env, capture_output=True).returncode == 2
