"""The gcloud commands for a Cloud TPU pod, as lists of arguments: nothing here runs them.

Every value that a user gave is one argument, or quoted for the worker's shell; none is ever pasted into a line.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwen2_jax.plan.chips import CHIPS
from qwen2_jax.plan.topology import ALIASES
from qwen2_jax.sharding.roll_call import COORDINATOR, PROCESS, PROCESSES

RUNTIMES = {"v2": "tpu-ubuntu2204-base", "v3": "tpu-ubuntu2204-base", "v4": "tpu-ubuntu2204-base",
            "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""Software versions by the generation (Cloud TPU documentation, "TPU software versions")."""
CORES = ("v2", "v3", "v4", "v5p")
"""Generations whose types count cores, two a chip; the others count chips."""
FOLDER = "qwen2_jax_pod"
"""On a worker, in the home folder."""
START = f"{FOLDER}/running"
"""Holds the process group of what runs."""
ADDRESS = "value(networkEndpoints[0].ipAddress)"


def worker_count(accelerator_type: str) -> int:
    """Hosts of one slice: four chips each, but v5e and v6e slices of up to eight chips lie in one."""
    generation, number = _parse(accelerator_type)
    chips = number // 2 if generation in CORES else number
    if generation in ("v5litepod", "v6e") and chips <= 8:
        return 1
    return max(1, chips // 4)


def _parse(accelerator_type: str) -> tuple[str, int]:
    match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,8})", accelerator_type)
    if accelerator_type.startswith("tpu7x"):
        raise ValueError("tpu7x has no TPU VMs: it is rented through GKE, see tools/pods/xpk.sh")
    if match is None or match[1] not in RUNTIMES:
        raise ValueError(f"--type {accelerator_type[:40]!r} is not an accelerator type: {', '.join(RUNTIMES)} followed "
                         "by -NUMBER, such as v5litepod-16")
    most = CHIPS[ALIASES.get(match[1], match[1])].most_chips * (2 if match[1] in CORES else 1)
    if int(match[2]) > most:
        raise ValueError(f"--type {accelerator_type!r} does not exist: the largest slice is {match[1]}-{most}")
    return match[1], int(match[2])


@dataclass(frozen=True)
class Pod:
    """One queued resource with its slices, and how to reach them. Raises ValueError for what gcloud would misread."""

    name: str
    zone: str
    project: str | None
    type: str
    slices: int = 1
    runtime: str | None = None
    spot: bool = False
    reserved: bool = False
    internal_ip: bool = False
    port: int = 8476
    env: tuple[str, ...] = ()

    def __post_init__(self):
        for flag, value in (("the name", self.name), ("--zone", self.zone), ("--project", self.project or "a"),
                            ("--runtime", self.runtime or "a")):
            # Google's names; above all none that begins with a dash and would be taken for a flag.
            if not re.fullmatch(r"[a-z][-a-z0-9.:]*", value):
                raise ValueError(f"{flag} must be lower-case letters, digits and dashes, found {value!r}")
        _parse(self.type)
        if self.slices < 1:
            raise ValueError(f"--slices must be at least 1, found {self.slices}")
        if self.spot and self.reserved:
            raise ValueError("--spot and --reserved exclude one another")
        if not 0 < self.port < 2**16:
            raise ValueError(f"--port must lie between 1 and 65535, found {self.port}")
        for setting in self.env:
            name, sign, _ = setting.partition("=")
            if not sign or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"--env takes NAME=VALUE, found {setting!r}")
            if name in (COORDINATOR, PROCESSES, PROCESS):
                raise ValueError(f"{name} is set by the launcher, worker by worker")

    def node(self, number: int) -> str:
        """The name of a slice."""
        return self.name if self.slices == 1 else f"{self.name}-{number}"

    def create(self) -> list[str]:
        nodes = ([f"--node-id={self.name}"] if self.slices == 1
                 else [f"--node-count={self.slices}", f"--node-prefix={self.name}"])
        return [*self._gcloud("queued-resources", "create", self.name), f"--accelerator-type={self.type}",
                f"--runtime-version={self.runtime or RUNTIMES[_parse(self.type)[0]]}", *nodes,
                *(["--spot"] if self.spot else []), *(["--reserved"] if self.reserved else []),
                *(["--internal-ips"] if self.internal_ip else [])]

    def state(self) -> list[str]:
        return [*self._gcloud("queued-resources", "describe", self.name), "--format=value(state.state)"]

    def delete(self) -> list[str]:
        return [*self._gcloud("queued-resources", "delete", self.name), "--force", "--quiet"]

    def describe(self, number: int) -> list[str]:
        return [*self._gcloud("tpu-vm", "describe", self.node(number)), "--format=json(networkEndpoints)"]

    def address(self) -> list[str]:
        """Prints the address of process 0."""
        return [*self._gcloud("tpu-vm", "describe", self.node(0)), f"--format={ADDRESS}"]

    def archive(self, root: Path, archive: Path) -> list[str]:
        """The last commit: what runs on the pod has a name, and the same is on every worker."""
        return ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]

    def copy(self, number: int, archive: Path) -> list[str]:
        return [*self._gcloud("tpu-vm", "scp", str(archive), f"{self.node(number)}:qwen2_jax.tar.gz"), "--worker=all",
                *self._route()]

    def install(self, number: int) -> list[str]:
        """The images of Cloud TPU hold Python 3.10, so uv brings a newer one."""
        steps = (f"rm -rf {FOLDER} && mkdir -p {FOLDER} && tar -xzf qwen2_jax.tar.gz -C {FOLDER}",
                 "python3 -m pip install --user --quiet uv",
                 f"python3 -m uv venv --quiet --python 3.12 {FOLDER}/venv",
                 f"python3 -m uv pip install --quiet --python {FOLDER}/venv/bin/python -e './{FOLDER}[tpu]'")
        return self._on(number, "all", " && ".join(steps))

    def start(self, command: list[str], number: int, worker: int, process: int, processes: int, host: str) -> list[str]:
        """Runs `command` on one worker; the connection lasts as long as it does.

        The three variables are ours rather than left to JAX's own detection: `distributed.start` then calls the roll
        before JAX waits for anybody, and the same command runs on a laptop under launch_local. They say what JAX would
        find: numbers go slice after slice, worker after worker. What a slice must know of the others (MEGASCALE_*)
        libtpu reads from the VM's metadata, where a queued resource of several slices puts it.
        """
        settings = [f"{COORDINATOR}={host}:{self.port}", f"{PROCESSES}={processes}", f"{PROCESS}={process}", *self.env]
        # A session of its own, whose number `stop` finds: what the command started is stopped with it, also when the
        # command itself has failed.
        program = (f"cd {FOLDER} && echo $$ > ~/{START} && export PATH=$PWD/venv/bin:$PATH && "
                   f"env {shlex.join([*settings, *command])}; status=$?; "
                   f"[ $status != 0 ] || rm -f ~/{START}; exit $status")
        return self._on(number, str(worker), f"setsid --wait bash -c {shlex.quote(program)}")

    def stop(self, number: int) -> list[str]:
        steps = (f"group=$(cat {START} 2>/dev/null) || exit 0; rm -f {START}; "
                 "kill -TERM -$group 2>/dev/null || exit 0; "
                 "for _ in 1 2 3 4 5; do kill -0 -$group 2>/dev/null || exit 0; sleep 1; done; "
                 "kill -KILL -$group 2>/dev/null; exit 0")
        return self._on(number, "all", steps)

    def _on(self, number: int, worker: str, line: str) -> list[str]:
        return [*self._gcloud("tpu-vm", "ssh", self.node(number)), f"--worker={worker}", *self._route(),
                f"--command={line}"]

    def _route(self) -> list[str]:
        return ["--internal-ip"] if self.internal_ip else []

    def _gcloud(self, group: str, verb: str, *names: str) -> list[str]:
        return ["gcloud", "compute", "tpus", group, verb, *names, f"--zone={self.zone}",
                *([f"--project={self.project}"] if self.project else [])]


class Shell:
    """Commands as lines of a script, in which a variable may stand for a value that only the run will know."""

    def __init__(self):
        self._variables: dict[str, str] = {}

    def variable(self, name: str) -> str:
        """A mark of letters, which no quoting changes, that `line` turns into the variable."""
        mark = f"VARIABLE{name}"
        self._variables[mark] = name
        return mark

    def line(self, command: list[str]) -> str:
        text = shlex.join(command)
        for mark, name in self._variables.items():
            text = text.replace(mark, f"'\"${name}\"'")     # out of the single quotes that the mark stands in, and back
        return text
