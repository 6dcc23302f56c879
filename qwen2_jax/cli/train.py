"""`qwen2-jax train FILE.py --out DIR`: train what an experiment file describes; the same command goes on."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.train.experiment import Experiment

DESCRIPTION = """\
Train the experiment that FILE.py holds under the name `experiment`, in the folder DIR. Run again, the same command goes
on where it stopped, to the last bit. SIGTERM ends the run after the step at hand, saved.
"""
EPILOG = "`qwen2-jax train FILE.py --help` lists every setting of the experiment with its value there."


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a model: an experiment file, a folder, settings",
                                   description=DESCRIPTION, epilog=EPILOG, add_help=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action=_Help, help="show this, and all settings of FILE.py")
    parser.add_argument("file", metavar="FILE.py", type=Path,
                        help="an experiment: a Python file that defines `experiment`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting, like steps=200, optimizer.peak=1e-3 or mesh=fsdp=2,tensor=2 (may be "
                             "repeated)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on where DIR stopped, or begin (default); never: begin, in an empty DIR; PATH: "
                             "go on from this run, or from one of its checkpoints, like RUN/checkpoints/100")
    parser.add_argument("--fork", type=Path, metavar="NEWDIR",
                        help="go on from DIR, or from --resume PATH, in this new folder, with any setting changed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qwen2_jax.settings import with_settings

    experiment = with_settings(read_experiment(args.file), args.assignments)
    from qwen2_jax.sharding import distributed
    from qwen2_jax.train.run import train
    from qwen2_jax.train.run_folder import begin

    distributed.start()
    start = begin(experiment, args.out.absolute(), resume=args.resume,
                  fork=None if args.fork is None else args.fork.absolute())
    logging.getLogger("qwen2_jax").setLevel(logging.INFO)   # which checkpoints are committed
    return train(start, say=_say if distributed.is_first() else lambda line: None, peak_flops=_peak_seconds)


def read_experiment(path: Path) -> Experiment:
    """The `experiment` of a Python file, which is run for it."""
    from qwen2_jax.train.experiment import Experiment

    if not path.is_file():
        raise UserError(f"there is no file {path}: name a Python file that defines `experiment`")
    spec = importlib.util.spec_from_file_location("_experiment", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module     # dataclasses in it look themselves up there
    sys.path.insert(0, str(_root(path.absolute())))
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)),
                    getattr(error, "lineno", None))
        raise UserError(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}") from error
    found = getattr(module, "experiment", None)
    if not isinstance(found, Experiment):
        raise UserError(f"{path} defines no `experiment` of the class qwen2_jax.train.experiment.Experiment, found "
                        f"{'nothing of that name' if found is None else type(found).__name__}")
    return found


def _root(path: Path) -> Path:
    """The folder from which the packages that the file lies in can be imported."""
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


class _Help(argparse.Action):
    """The usual help, then every setting: of FILE.py where it stands before."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        text = parser.format_help()
        if file := getattr(namespace, "file", None):
            text += "\nsettings, --set NAME=VALUE, with their values in " + f"{file}:\n" + "\n".join(
                _listed(read_experiment(file))) + "\n"
        parser.exit(message=None) if sys.stdout is None else print(text, end="")
        parser.exit()


def _listed(experiment: Any) -> Iterator[str]:
    import shutil
    import textwrap

    from qwen2_jax.settings import settings

    width = min(120, shutil.get_terminal_size().columns)
    for setting in settings(experiment):
        value = "none" if setting.value is None else str(setting.value) if setting.value != "" else "(empty)"
        yield f"  {setting.name}={value}  ({setting.type})"
        yield from textwrap.wrap(setting.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _peak_seconds(experiment: Experiment) -> float | None:
    """Model FLOPs of a step over those a second that all devices of its mesh could do."""
    import jax

    from qwen2_jax.plan.chips import chip_of
    from qwen2_jax.plan.flops import model_flops
    from qwen2_jax.sharding.mesh import make_mesh

    mesh = make_mesh(experiment.mesh)
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    flops = model_flops(experiment.model, "train", experiment.data.batch_size, experiment.data.row_length)
    return flops / (chip.flops * len(devices))


def _say(line: str) -> None:
    print(f"qwen2-jax: {line}", file=sys.stderr, flush=True)
