"""Numbers for people and for files: a progress bar, a JSON line a step, bits per byte."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
        self._tokens = 0.0
        self._since: float | None = None

    def on_metrics(self, step, metrics):
        now = time.perf_counter()
        if self._since is None:
            self._since = now       # the first step is mostly compilation, so its tokens do not count
        else:
            self._tokens += metrics["tokens"]
        rate = f"{self._tokens / (now - self._since):,.0f}" if self._tokens else "…"
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, {rate} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self):
        self._bar.close()


class MetricsFile(Hook):
    """One JSON object a line and a step: `step`, `seconds` since the run began or went on, and the step's metrics.

    Going on from step `start` drops later lines of an earlier, interrupted run and writes after the rest. NaN and
    infinities become null, which every JSON reader takes.
    """

    def __init__(self, path: str | Path, *, start: int = 0):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if start == 0 or not self.path.exists() else _lines_until(self.path, start)
            staged = self.path.with_name(self.path.name + ".tmp")
            staged.write_text("".join(kept), encoding="utf-8")
            os.replace(staged, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self._began = time.perf_counter()

    def on_metrics(self, step, metrics):
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "seconds": round(time.perf_counter() - self._began, 3), **numbers}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `MetricsFile`; a last line cut off by a kill is passed over."""
    parsed = map(_parse, Path(path).read_text(encoding="utf-8").splitlines())
    return [record for record in parsed if record is not None]


def _lines_until(path: Path, step: int) -> list[str]:
    return [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
