"""Numbers for people and for files: a progress bar, a JSON line a step, bits per byte."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from qwen2_jax.checkpoint import fault
from qwen2_jax.errors import UserError
from qwen2_jax.train.loop import Hook


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed negative log-probability of a text, in nats, → bits for each byte of it: comparable across tokenizers."""
    return nats / (n_bytes * math.log(2))


class Progress(Hook):
    """A bar on stderr with the loss in nats a token, the learning rate, and training tokens (targets) a second."""

    def __init__(self, *, start: int, stop: int):
        # In a log each refresh is a line of its own.
        self._bar = tqdm(initial=start, total=stop, desc="training", unit="step", dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 20)
        self._targets = self._seconds = 0.0
        self._first = True

    def on_metrics(self, step, metrics):
        if not self._first:         # the first step is mostly compilation
            self._targets += metrics["targets"]
            self._seconds += metrics["time_step"]
        self._first = False
        rate = f"{self._targets / self._seconds:,.0f}" if self._targets else "…"
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, lr {metrics['learning_rate']:.1e}, {rate} tokens/s",
                                  refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self):
        self._bar.close()


class Totals(NamedTuple):
    """What a run has used since its first step."""

    tokens: int = 0
    """Targets trained on."""
    tokens_seen: int = 0
    """Tokens that went in, whether their targets counted or not; no padding."""


NOTHING = Totals()


class LinesFile:
    """A file of one JSON object a line, each with its `step`; going on from step `start` moves later lines away.
    Without a path nothing is written: of several processes one writes for all."""

    def __init__(self, path: str | Path | None, *, start: int = 0):
        self._file: IO[str] | None = None
        if path is None:
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _supersede(path, start)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if fault.armed():       # a line of which a kill leaves a half
            self._file.write(line[:len(line) // 2])
            self._file.flush()
            fault.reach("during_metrics_write")
            line = line[len(line) // 2:]
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Returns when every line so far is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricsFile(Hook):
    """One JSON object a line and a step, each step once and in order: `step`, the step's numbers, the `Totals` after
    it, and `mfu`: model FLOPs over what the devices could have done in `time_step`, null without `flops_share`.

    Going on from step `start` (with the `totals` at it), later lines of an earlier run move to
    `<name>.superseded.jsonl`. NaN and infinities become null, which every JSON reader takes; other floats read back
    bit-equal. `flops_share`: model FLOPs of a step over the FLOPs a second of all devices' peaks, in seconds.
    """

    def __init__(self, path: str | Path | None, *, start: int = 0, totals: Totals = NOTHING,
                 flops_share: float | None = None):
        self.totals, self._flops_share = totals, flops_share
        self._lines = LinesFile(path, start=start)

    def on_metrics(self, step, metrics):
        targets, seen = round(metrics["targets"]), round(metrics["seen"])
        self.totals = Totals(self.totals.tokens + targets, self.totals.tokens_seen + seen)
        others = {name: value if math.isfinite(value) else None for name, value in metrics.items()
                  if name not in ("targets", "seen")}
        mfu = None if self._flops_share is None else self._flops_share / metrics["time_step"]
        self._lines.write(step, {**others, **self.totals._asdict(), "mfu": mfu})

    def sync(self) -> None:
        """Returns when every line so far is on the disk."""
        self._lines.sync()

    def close(self):
        self._lines.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `MetricsFile`; a last line cut off by a kill is passed over."""
    parsed = map(_parse, Path(path).read_text(encoding="utf-8").splitlines())
    return [record for record in parsed if record is not None]


def _supersede(path: Path, start: int) -> None:
    """Leaves the lines up to step `start`, as they are; those after it go into the file of superseded ones first, so
    that a kill between the two repeats them there and loses none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [(line, _parse(line)) for line in lines]
    kept = [line for line, record in records if record is not None and record["step"] <= start]
    later = [line for line, record in records if record is not None and record["step"] > start]
    if later:
        with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(later)
            file.flush()
            os.fsync(file.fileno())
    if kept != lines:
        staged = path.with_name(path.name + ".tmp")
        with staged.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
