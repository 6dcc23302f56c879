"""The same command on every worker of a Cloud TPU slice, or of several slices, through gcloud.

    python -m tools.launch_pod my-pod --zone us-west4-a --type v5litepod-16 --create --install -- \\
        qwen2-jax doctor --mesh fsdp=4x4

--create   makes the slices (a queued resource; waits in its queue) or takes those that are there
--install  copies this checkout's last commit to every worker and installs it (Python 3.12, the extra `tpu`)
-- COMMAND runs on every worker at once; lines are prefixed with the worker's number, and when one fails the others are
           stopped, and the exit status and the message are the failed one's
--stop     stops what an earlier start left running
--delete   gives the slices back, after the command, whatever became of it

--dry-run prints the commands instead, as a shell script that can be run as it is. docs/pods.md is the way from nothing
to a running job.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.launch_local import INTERRUPTED, watch
from tools.pod_commands import Pod, Shell, worker_count

ROOT = Path(__file__).resolve().parents[1]
POLL = 15.0
"""Seconds between two looks at a queued resource."""
ANEW = "to start anew give it back with --delete"
WAITING = ("ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "PROVISIONING")


class Failed(Exception):
    """A gcloud command failed; the message is the user's."""


def create(pod: Pod) -> None:
    """Returns when the slices are there."""
    state = _state(pod)
    if state is None:
        _call(pod.create())
        state = _state(pod)
    while state in WAITING:
        print(f"launch_pod: {pod.name} is {state}", file=sys.stderr, flush=True)
        time.sleep(POLL)
        state = _state(pod)
    if state != "ACTIVE":
        raise Failed(f"{pod.name} is {state or 'gone'}; {ANEW}")


def _state(pod: Pod) -> str | None:
    """A queued resource's state, None where there is none of that name."""
    done = subprocess.run(pod.state(), capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
        return None
    raise Failed(f"gcloud cannot tell the state of {pod.name}: {_last(done.stderr)}")


def workers(pod: Pod) -> list[str]:
    """Addresses of all workers, slice after slice: the index is the process's number."""
    found = []
    for number in range(pod.slices):
        done = subprocess.run(pod.describe(number), capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"gcloud knows no slice {pod.node(number)}: {_last(done.stderr)}; --create makes it")
        try:
            found.append([endpoint["ipAddress"] for endpoint in json.loads(done.stdout)["networkEndpoints"]])
        except (ValueError, KeyError, TypeError) as e:
            raise Failed(f"gcloud does not tell the addresses of {pod.node(number)}'s workers; is it READY?") from e
    if len({len(addresses) for addresses in found}) > 1:
        raise Failed(f"the slices of {pod.name} are of {', '.join(str(len(a)) for a in found)} workers: not one pod")
    return [address for addresses in found for address in addresses]


def install(pod: Pod) -> None:
    changed = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain"], capture_output=True, text=True).stdout
    if changed:
        print(f"launch_pod: {len(changed.splitlines())} files are not committed as they are here; the last commit is "
              "what the workers get", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "qwen2_jax.tar.gz"
        _call(pod.archive(ROOT, archive))
        for number in range(pod.slices):
            _call(pod.copy(number, archive))
            _call(pod.install(number))


def run(pod: Pod, command: list[str]) -> int:
    """Exit status: 0 when every worker ends with 0, otherwise the first failure's."""
    addresses = workers(pod)
    each = len(addresses) // pod.slices
    starts = [pod.start(command, number, worker, number * each + worker, len(addresses), addresses[0])
              for number in range(pod.slices) for worker in range(each)]
    return watch(lambda number: _start(starts[number]), len(starts), "launch_pod: worker", lambda: stop(pod))


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", start_new_session=True)


def stop(pod: Pod) -> None:
    """End what runs on every worker: closing gcloud's connection would leave it running, and the TPU held."""
    ending = [subprocess.Popen(pod.stop(number), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
              for number in range(pod.slices)]
    for number, process in enumerate(ending):
        if process.wait():
            print(f"launch_pod: {pod.node(number)} may still be running something; look with --stop", file=sys.stderr)


def script(pod: Pod, args: argparse.Namespace) -> list[str]:
    """What would be done, as lines of a shell script."""
    shell, each = Shell(), worker_count(pod.type)
    lines = ["set -e"]
    if args.delete:     # whatever becomes of what follows
        lines += [f"give_back() {{ {shell.line(pod.delete())}; }}", "trap give_back EXIT",
                  f"trap 'exit {INTERRUPTED}' INT TERM"]
    if args.stop:
        lines += [shell.line(pod.stop(n)) for n in range(pod.slices)]
    if args.create:
        lines += [f"{shell.line(pod.state())} || {shell.line(pod.create())}",
                  f"while state=$({shell.line(pod.state())}); do", '  case "$state" in',
                  f"    {'|'.join(WAITING)}) sleep {POLL:g} ;;", "    *) break ;;", "  esac", "done",
                  f'[ "$state" = ACTIVE ] || {{ echo "{pod.name} is ${{state:-gone}}; {ANEW}" >&2; exit 2; }}']
    if args.install:
        archive = Path("/tmp/qwen2_jax.tar.gz")
        lines.append(shell.line(pod.archive(ROOT, archive)))
        for n in range(pod.slices):
            lines += [shell.line(pod.copy(n, archive)), shell.line(pod.install(n))]
    if args.command:
        lines += [f"COORDINATOR=$({shell.line(pod.address())})", "workers="]
        lines += [shell.line(pod.start(args.command, n, worker, n * each + worker, each * pod.slices,
                                       shell.variable("COORDINATOR"))) + ' & workers="$workers $!"'
                  for n in range(pod.slices) for worker in range(each)]
        # `wait` alone ends with 0, whatever the workers ended with.
        lines += ["number=0 failed=0", "for worker in $workers; do", "  status=0; wait $worker || status=$?",
                  '  [ $status = 0 ] || echo "worker $number exited with status $status" >&2',
                  "  [ $failed != 0 ] || failed=$status", "  number=$((number + 1))", "done", "exit $failed"]
    return lines


def _call(command: list[str]) -> None:
    print(f"launch_pod: {shlex.join(command)}", file=sys.stderr, flush=True)
    if status := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise Failed(f"{' '.join(command[:5])} … ended with status {status}")


def _last(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it says nothing"


def parse(argv: list[str] | None) -> tuple[Pod, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, prog="launch_pod",
                                     usage="%(prog)s NAME --zone ZONE --type TYPE [flags] [-- COMMAND …]")
    parser.add_argument("name", help="of the queued resource, and of its slice; several slices are NAME-0, NAME-1, …")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument("--type", required=True, help="accelerator type of a slice, such as v5litepod-16 or v5p-128")
    parser.add_argument("--slices", type=int, default=1, help="how many (default: 1); `data` goes over them")
    parser.add_argument("--runtime", help="software version of the TPU VM (default: by the type)")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--reserved", action="store_true", help="from a reservation")
    parser.add_argument("--internal-ip", action="store_true", help="reach workers from inside their network")
    parser.add_argument("--port", type=int, default=8476, help="of process 0, where the others find it (default: 8476)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                        help="set on every worker (may be repeated)")
    for step, what in (("create", "make the slices, or wait for them"), ("install", "copy and install this checkout"),
                       ("stop", "stop what runs"), ("delete", "give the slices back at the end")):
        parser.add_argument(f"--{step}", action="store_true", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print the commands as a shell script, run none")
    given = sys.argv[1:] if argv is None else argv
    mark = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:mark])
    args.command = given[mark + 1:]
    if not (args.command or args.create or args.install or args.stop or args.delete):
        parser.error("nothing to do: give --create, --install, --stop, --delete or a command behind --")
    try:
        pod = Pod(args.name, args.zone, args.project, args.type, args.slices, args.runtime, args.spot, args.reserved,
                  args.internal_ip, args.port, tuple(args.env))
    except ValueError as e:
        parser.error(str(e))
    return pod, args


def main(argv: list[str] | None = None) -> int:
    pod, args = parse(argv)
    if args.dry_run:
        print(*script(pod, args), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # stops the workers too
    try:
        return do(pod, args)
    except FileNotFoundError as e:
        print(f"launch_pod: {e.filename} is not on the PATH", file=sys.stderr)
    except Failed as e:
        print(f"launch_pod: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        print("launch_pod: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 2


def do(pod: Pod, args: argparse.Namespace) -> int:
    """The steps asked for, in their order; slices are given back whatever became of the others."""
    try:
        if args.stop:
            stop(pod)
        if args.create:
            create(pod)
        if args.install:
            install(pod)
        return run(pod, args.command) if args.command else 0
    finally:
        if args.delete:
            _call(pod.delete())


if __name__ == "__main__":
    sys.exit(main())
