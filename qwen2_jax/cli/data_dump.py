"""`qwen2-jax data dump EXPERIMENT --steps 1:200 --out FILE.npz`: the batches of a run, for any other program."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen2_jax.errors import UserError

DESCRIPTION = """\
Writes the batches that steps A to B train on (both included, counted from 1) as int32 arrays [steps, rows, tokens]:
input_ids, targets (the token after each), loss_mask (1 where the target counts), segment_ids (1, 2, … for the pieces of
a row, 0 for padding; tokens see their own segment alone), positions (from 0 in each segment).
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("dump", help="write the batches of a run as NumPy arrays", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", metavar="EXPERIMENT", type=Path,
                        help="the folder of a run, or an experiment's file")
    parser.add_argument("--steps", required=True, metavar="A:B", help="the first step and the last, like 1:200")
    parser.add_argument("--out", required=True, metavar="FILE.npz", type=Path, help="where to write them")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting of an experiment's file, as for train (may be repeated)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    first, last = _steps(args.steps)
    import numpy as np
    from tqdm import tqdm

    from qwen2_jax.cli.output import whole_file
    from qwen2_jax.cli.train import read_experiment
    from qwen2_jax.settings import with_settings
    from qwen2_jax.train.corpus import open_corpus
    from qwen2_jax.train.run_folder import read_config

    with tempfile.TemporaryDirectory() as scratch:
        if args.experiment.is_dir():
            if args.assignments:
                raise UserError(f"--set changes an experiment's file, and {args.experiment} is a run: its batches are "
                                "what they are")
            experiment, folder = read_config(args.experiment), args.experiment.absolute()
        else:
            experiment, folder = with_settings(read_experiment(args.experiment), args.assignments), Path(scratch)
        stream = open_corpus(experiment, folder, source=None, say=_say).stream
        with whole_file(args.out, "wb") as file:
            batches = [stream.batch(step - 1) for step in tqdm(range(first, last + 1), desc="dump", unit="step")]
            arrays = {
                "input_ids": [b.ids_BT for b in batches], "targets": [b.targets_BT for b in batches],
                "loss_mask": [b.weights_BT.astype(np.int32) for b in batches],
                "segment_ids": [b.segments_BT for b in batches], "positions": [b.positions_BT for b in batches]}
            stacked: dict[str, Any] = {name: np.stack(rows) for name, rows in arrays.items()}
            np.savez_compressed(file, **stacked)
    return 0


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if all(n.isascii() and n.isdecimal() and len(n) < 19 for n in (first, last)) and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise UserError(f"--steps is written A:B, the first step and the last, from 1 on, like 1:200; found '{text}'")


def _say(line: str) -> None:
    print(f"qwen2-jax: {line}", file=sys.stderr, flush=True)
