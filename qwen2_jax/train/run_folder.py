"""The folder of a training run, and how a run that is started again goes on.

    config.json      the experiment, every setting of it, and the versions it began with
    status.json      how far it is: {"state": "starting" | "running" | "preempted" | "interrupted" | "failed" |
                     "finished", "step", "steps"}
    metrics.jsonl, eval.jsonl
    checkpoints/{step}/
    tokenizer/, data/    what was made of text for this run
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen2_jax.checkpoint.step_folders import committed_steps
from qwen2_jax.errors import UserError
from qwen2_jax.settings import differences, from_plain, plain
from qwen2_jax.train.experiment import Experiment, is_free

CONFIG, STATUS, CHECKPOINTS = "config.json", "status.json", "checkpoints"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
State = Literal["starting", "running", "preempted", "interrupted", "failed", "finished"]
TOKENIZER, DATA = "tokenizer", "data"
TEXT = ("data.path", "data.sources", "data.text_key", "data.document", "data.tokenizer", "model.vocab")
"""Settings that tokens depend on."""


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    folder: Path
    experiment: Experiment
    """With every setting that was left open filled in."""
    source: Path | None = None
    """The run whose state it goes on from: this folder's, or another; None for a new run."""
    step: int | None = None
    """The step of `source` to go on from; None: its newest."""
    other_text: bool = False
    """Whether tokens that lie in the folder are of another text, from a start that never came to training."""


def begin(experiment: Experiment, out: Path, *, resume: str = "auto", fork: Path | None = None) -> Start:
    """Decides, from what lies in `out`, whether a run is new or goes on; nothing is written.

    `resume`: "auto" goes on where `out` stopped, or begins; "never" begins, in an empty folder; else the folder of a
    run, or of one of its steps, to go on from: in `out`, which is that run's own folder or a new one. `fork`: goes on
    in this new folder instead of `out`, and any setting may have changed.

    Raises UserError: a folder that is not empty and no run's; settings that may not change, each with both values.
    """
    source, step = (out, None) if resume in ("auto", "never") else _step_of(Path(resume))
    if fork is not None:
        if resume == "never":
            raise UserError("--fork goes on from a run, --resume never does not: take one of them")
        _refuse_used(fork, "--fork")
        saved = read_config(source)
        return Start(fork, experiment.resolved(saved.optimizer.steps), source, step)
    if resume == "never":
        _refuse_used(out, "--resume never")
    if source == out and not (out / CONFIG).exists():
        if resume not in ("auto", "never"):
            raise UserError(f"{out} holds no run: {CONFIG} is missing")
        _refuse_used(out, "--out")
        return Start(out, experiment.resolved())
    saved = read_config(source)
    if source != out:
        _refuse_used(out, "--out")
    elif step is None and not committed_steps(out / CHECKPOINTS):
        found = differences(plain(saved), plain(experiment.resolved()))
        return Start(out, experiment.resolved(), other_text=any(name.startswith(TEXT) for name in found))
    experiment = experiment.resolved(saved.optimizer.steps)
    changed = {name: pair for name, pair in differences(plain(saved), plain(experiment)).items() if not is_free(name)}
    if changed:
        told = "; ".join(f"{name} was {json.dumps(before)}, is {json.dumps(after)}"
                         for name, (before, after) in changed.items())
        raise UserError(f"{source} cannot go on with other settings than it began with: {told}. Set them back, or go "
                        "on in a new folder with --fork NEWDIR")
    return Start(out, experiment, source, step)


def read_config(folder: Path) -> Experiment:
    """The experiment of a run's folder. Raises UserError where there is none, or none that this version knows."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return from_plain(found["experiment"], Experiment)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: {CONFIG} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} is damaged or of another program: no experiment in it") from None
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def write_config(start: Start) -> None:
    """Notes the experiment in its folder, with the steps and the mesh that it has now."""
    write_json(start.folder / CONFIG, {"experiment": plain(start.experiment), "versions": versions()})


def write_status(folder: Path, state: State, step: int, steps: int, **more: Any) -> None:
    write_json(folder / STATUS, {"state": state, "step": step, "steps": steps, **more})


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote; empty without it."""
    try:
        return json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or as it was before, whatever happens meanwhile."""
    staged = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def versions() -> dict[str, str]:
    """What the numbers of a run depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def _step_of(path: Path) -> tuple[Path, int | None]:
    """(run, step) of a run's folder, its folder of checkpoints, or one of its steps'."""
    path = path.absolute()
    if (path / CONFIG).exists() and path.name != CHECKPOINTS and path.parent.name != CHECKPOINTS:
        return path, None
    if path.name == CHECKPOINTS:
        return path.parent, None
    if path.parent.name == CHECKPOINTS and path.name.isascii() and path.name.isdecimal() and path.is_dir():
        return path.parent.parent, int(path.name)
    raise UserError(f"--resume {path}: neither a run's folder, which has {CONFIG}, nor one of its steps', like "
                    f"RUN/{CHECKPOINTS}/100")


def _refuse_used(folder: Path, flag: str) -> None:
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    if used:
        raise UserError(f"{flag} needs a new or empty folder, and {folder} is neither: choose another"
                        + ("" if flag != "--out" else f", or one whose {CONFIG} is a run's"))
