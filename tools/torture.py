"""Kill a training run again and again, and see whether it ends as if nothing had happened.

    python -m tools.torture --kills 50 --seed 0 [--report FILE.md]

A small run is made once without interruption. Then, for each kill, it is begun anew, its process group killed with
SIGKILL, and the same command run again until it ends: its losses must be those of the first, every line and every bit,
and it must go on from the last checkpoint whose commit was logged, or a later one. A part of the kills, at least
twenty of fifty, falls at named points of saving, retention and writing; the others at any time, start and compilation
included. Exit status 1 when a trial fails; its folder is kept and named.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qwen2_jax.checkpoint.fault import POINTS, VARIABLE
from qwen2_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
AT_POINTS = 0.5
"""Share of the kills at named points."""
STEPS, EVERY, KEEP = 12, 3, 2
PATIENCE = 300.0
"""Seconds that a run may take."""
EXACT = ("step", "loss", "nll", "grad_norm", "learning_rate", "tokens", "tokens_seen")
TIMES = {"during_retention": 1, "during_metrics_write": STEPS}
"""How often a run comes to a point; to the others once a checkpoint."""
EXPERIMENT = """
from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.optim.adamw import AdamWConfig
from qwen2_jax.train.experiment import CheckpointConfig, DataConfig, Experiment

experiment = Experiment(
    model=ModelConfig(vocab=320, layers=1, d_model=16, d_ff=24, heads=2, kv_heads=1, head_dim=8, tied=True,
                      norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=32, init_std=0.1, dtype="float32"),
    data=DataConfig(path={text!r}, row_length=32, batch_size=4),
    optimizer=AdamWConfig(peak=1e-2, warmup=2), steps={steps}, remat="none",
    checkpoint=CheckpointConfig(every={every}, keep={keep}))
"""


@dataclass(frozen=True)
class Kill:
    """At the `count`-th time at `point`, or after `seconds`."""

    point: str = ""
    count: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.point}:{self.count}" if self.point else f"after {self.seconds:.2f} s"


class Torture:
    """One experiment in a folder, and its losses when nothing interrupts it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        write_text(folder / "text.jsonl", self.chance)
        (folder / "experiment.py").write_text(EXPERIMENT.format(text=str(folder / "text.jsonl"), steps=STEPS,
                                                                every=EVERY, keep=KEEP), encoding="utf-8")
        self.run(folder / "warm")       # compiles, so that the next tells how long a run takes
        began = time.monotonic()
        done = self.run(folder / "whole")
        self.seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"the run without a kill failed: {done.stderr}")
        self.expected = losses(folder / "whole")

    def kills(self, number: int) -> list[Kill]:
        """Named points in turn, then times drawn evenly."""
        at_points = [Kill(point, 1 + self.chance.randrange(TIMES.get(point, STEPS // EVERY)))
                     for point in itertools.islice(itertools.cycle(POINTS), round(number * AT_POINTS))]
        return at_points + [Kill(seconds=self.chance.uniform(0, self.seconds)) for _ in range(number - len(at_points))]

    def run(self, out: Path, kill: Kill | None = None) -> subprocess.CompletedProcess[str]:
        """The command, in a process group of its own, killed or not."""
        command = [sys.executable, "-m", "qwen2_jax", "train", str(self.folder / "experiment.py"), "--out", str(out)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "QWEN2_JAX_CACHE": str(self.folder / "cache")}
        if kill is not None and kill.point:
            environment[VARIABLE] = f"{kill.point}:{kill.count}"
        with (self.folder / "said").open("w+", encoding="utf-8") as said:
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said,
                                  start_new_session=True) as process:
                try:
                    process.wait(PATIENCE if kill is None or kill.point else kill.seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            said.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, "", said.read())

    def trial(self, out: Path, kills: list[Kill]) -> tuple[int, list[str]]:
        """One run with each of the kills in it, one after the other, made to its end: (kills that hit it before it
        ended, what is wrong)."""
        wrong, hit = [], 0
        for kill in kills:
            done = self.run(out, kill)
            if done.returncode == 0:
                break       # the kill came too late, or its point was passed before
            hit += 1
            if done.returncode != -signal.SIGKILL:
                return hit, [f"{kill}: exit status {done.returncode}: {done.stderr[-500:]}"]
            committed = max((int(n) for n in re.findall(r"checkpoint (\d+) committed", done.stderr)), default=0)
        done = self.run(out)
        if done.returncode:
            return hit, [f"could not go on: exit status {done.returncode}: {done.stderr[-500:]}"]
        found = re.search(r"going on from step (\d+)", done.stderr)
        if hit and committed and not (found and int(found[1]) >= committed) and "made its" not in done.stderr:
            wrong.append(f"checkpoint {committed} was committed, and the run went on from {found and found[1]}")
        if losses(out) != self.expected:
            wrong.append("the losses are not those of the run without a kill")
        return hit, wrong


def losses(out: Path) -> list[dict[str, float]]:
    return [{name: line[name] for name in EXACT} for line in read_metrics(out / "metrics.jsonl")]


def write_text(path: Path, chance: random.Random) -> None:
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(80)]
    rows = [" ".join(chance.choices(words, k=chance.randint(5, 40))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def report(results: list[tuple[Kill, int, list[str]]], seconds: float, seed: int) -> str:
    """The trials as a page in Markdown."""
    hit = [result for result in results if result[1]]
    failed = [result for result in results if result[2]]
    lines = ["# A run that is killed", "", f"`python -m tools.torture --kills {len(results)} --seed {seed}`, "
             f"commit {commit()}, {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python "
             f"{platform.python_version()}. A run of {STEPS} steps with a checkpoint every {EVERY}, of which {KEEP} "
             f"stay, takes {seconds:.1f} s when nothing interrupts it.", "",
             f"{len(hit)} of {len(results)} kills hit the run before it ended; {len(failed)} trials failed.", "",
             "| SIGKILL | result |", "|---|---|"]
    lines += [f"| {kill} | {'; '.join(wrong) or ('the same losses, every bit' if count else 'came too late')} |"
              for kill, count, wrong in results]
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Of the checkout that the tool lies in."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="trials, one kill each (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and of the kills (default: 0)")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the trials there")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills must be at least 1, found {args.kills}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    torture, results = Torture(folder, args.seed), []
    for number, kill in enumerate(tqdm(torture.kills(args.kills), desc="torture", unit="kill")):
        out = folder / str(number)
        count, wrong = torture.trial(out, [kill])
        results.append((kill, count, wrong))
        if wrong:
            print(f"{kill}: {'; '.join(wrong)}; kept in {out}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(out)
    text = report(results, torture.seconds, args.seed)
    if args.report is not None:
        args.report.write_text(text, encoding="utf-8")
    failed = sum(bool(wrong) for _, _, wrong in results)
    print(f"{len(results)} kills, {failed} failures")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
