"""`qwen2-jax plan`: will it fit, and how fast will it be, before a TPU is rented. Exit status 0 also when it does not
fit: that is an answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from qwen2_jax.cli.info import find_model
from qwen2_jax.cli.output import check_writable, whole_file
from qwen2_jax.config import Remat
from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen2_jax.plan.plan import Plan
    from qwen2_jax.plan.program import Task
    from qwen2_jax.plan.topology import Topology

MODES = ("train", "prefill", "decode")
MOST = 2**31 - 1


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan", help="will it fit a TPU, and how fast: compiled without one",
        description="Compile a training step, a prefill or a decoding step for a TPU slice, without a TPU (the extra "
                    "`tpu` is needed), and print its memory, what travels between devices, and how long it should "
                    "take. Times are predictions. Exit status 0 whether it fits or not.",
    )
    parser.add_argument("model", metavar="DIR|PRESET",
                        help="a folder with config.json, that file, or a published name such as Qwen2-7B")
    parser.add_argument("--topology", metavar="T",
                        help="like v5e:4x4, or a slice's name like v5p-32 (it counts cores on v2 to v4, v5p and tpu7x, "
                             "chips on v5e and v6e)")
    parser.add_argument("--mesh", metavar="SPEC",
                        help="axes like fsdp=4x4 or fsdp=8,tensor=2; auto compiles the three most promising and ranks "
                             "them (default: auto, on one device none)")
    parser.add_argument("--mode", choices=MODES, default="train", help="what to plan (default: train)")
    parser.add_argument("--seq", type=int, default=4096, metavar="N",
                        help="tokens a row; in decode those in the cache (default: 4096)")
    parser.add_argument("--batch", type=int, metavar="N",
                        help="rows on all devices together (default: one a device)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="what is computed in, and what serving holds; training holds float32 (default: bfloat16)")
    parser.add_argument("--remat", choices=get_args(Remat),
                        help="what training computes again in the backward pass (default: full, everything but the "
                             "blocks' inputs)")
    parser.add_argument("--quant", choices=("int8",), help="weights held in int8: prefill and decode")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")
    parser.add_argument("--run", type=int, dest="runs", metavar="N",
                        help="also run the step N times on the devices of this machine, with random weights")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ignore-field", metavar="NAME", action="append", default=[],
                        help="pass over this field of config.json though it is unknown (may be repeated)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    name, cfg = find_model(args.model, ignore=args.ignore_field)
    _start_jax(compile_only=args.runs is None)
    from qwen2_jax.plan.program import Task
    from qwen2_jax.plan.topology import parse_topology

    topology = None if args.topology is None else parse_topology(args.topology)
    devices = topology.devices if topology else 1
    task = Task(cfg=cfg, mode=args.mode, seq=args.seq, batch=args.batch or devices, dtype=args.dtype,
                remat=args.remat or "full", quant=args.quant)
    plans = [] if topology is None else _plans(name, task, topology, args)
    measured = None if args.runs is None else _measure(task, args, plans)
    if args.hlo is not None:
        _write_text(plans[0], args.hlo)
    _print(plans, measured, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    for flag, value in (("--seq", args.seq), ("--batch", args.batch), ("--run", args.runs)):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{flag} must lie between 1 and {MOST}, found {value}")
    if args.topology is None and args.runs is None:
        raise UserError("plan needs --topology, the slice to plan for, like v5e:4x4 or v5p-32")
    if args.topology is None and args.hlo is not None:
        raise UserError("--hlo needs --topology: it writes the program compiled for one")
    if args.hlo is not None:
        check_writable(args.hlo)
    if args.quant and args.mode == "train":
        raise UserError("--quant int8 is for --mode prefill and decode: training needs weights that can change")
    if args.remat and args.mode != "train":
        raise UserError("--remat is for --mode train: nothing is kept for a backward pass otherwise")


@contextlib.contextmanager
def _ends_at_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process there and then: Python's own handlers would wait for the compiler, which can
    take minutes. Nothing is written in the meantime."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:     # not of Python
                signal.signal(number, handler)


def _write_text(plan: Plan, path: str) -> None:
    if not plan.text:
        return _say(f"{path} is not written: the program does not fit, so there is no text of it")
    with whole_file(path) as stream:
        stream.write(plan.text)


def _start_jax(*, compile_only: bool) -> None:
    """Before libtpu is told that there is no TPU: the compiler alone must not take the machine's devices, and a run
    needs them."""
    if compile_only:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        return
    import jax

    jax.devices()


def _plans(name: str, task: Task, topology: Topology, args: argparse.Namespace) -> list[Plan]:
    """The plan asked for; with `--mesh auto` those that fit, the best first."""
    from qwen2_jax.plan.auto import best_plans
    from qwen2_jax.plan.costs import UnknownKernel
    from qwen2_jax.plan.plan import make_plan
    from qwen2_jax.plan.topology import tpu_devices

    mesh = args.mesh if args.mesh is not None else "auto" if topology.devices > 1 else ""
    tpu_devices(topology)       # first, as libtpu makes signals that nobody handles print a page of addresses
    try:
        with _ends_at_once():
            if mesh == "auto":
                return best_plans(name, task, topology, say=_say)
            return [make_plan(name, task, topology, mesh, say=_say)]
    except UnknownKernel as error:
        raise UserError(f"the program cannot be priced: {error}") from error


def _measure(task: Task, args: argparse.Namespace, plans: list[Plan]) -> tuple[list[float], Mesh]:
    """Seconds of each run, and the mesh that they were on."""
    import jax

    from qwen2_jax.plan.measure import measure
    from qwen2_jax.plan.program import mesh_of

    mesh = plans[0].mesh if plans else args.mesh or ""
    if mesh == "auto":
        raise UserError("--mesh auto needs --topology; with --run alone, say which mesh")
    on = mesh_of(mesh, jax.devices())
    kind = on.devices.flat[0].device_kind
    _say(f"running the step {args.runs + 1} times on {on.size} x {kind}, the first to compile")
    return measure(task, on, args.runs), on


def _print(plans: list[Plan], measured: tuple[list[float], Mesh] | None, args: argparse.Namespace) -> None:
    from qwen2_jax.plan import report
    from qwen2_jax.plan.auto import smallest_that_fits

    if args.json:
        found: dict[str, Any] = plans[0].plain() if plans else {}
        if measured is not None:
            found |= report.measured_plain(*measured)
        print(json.dumps(found, indent=2))
    else:
        told = report.lines(plans[0]) if plans else []
        if plans and not plans[0].fits:
            told += ["", report.fitting(smallest_that_fits(plans[0]), plans[0])]
        if len(plans) > 1:
            told += ["", *report.ranking(plans)]
        if measured is not None:
            told += ["", *report.measured(*measured, plans[0] if plans else None)]
        print("\n".join(told).strip("\n"))
    for line in report.warnings(plans[0]) if plans else ():
        _say(f"warning: {line}")


def _say(line: str) -> None:
    print(f"qwen2-jax: {line}", file=sys.stderr, flush=True)
