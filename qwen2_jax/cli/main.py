"""The `qwen2-jax` command: parse, run one subcommand, turn what went wrong into one line and an exit status.

Exit status: 0 done, 1 our bug, 2 an error of the user's, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from qwen2_jax.cli.compilation_cache import enable_compilation_cache
from qwen2_jax.cli.parser import build_parser, parse
from qwen2_jax.errors import UserError

BUG, USER_ERROR, INTERRUPTED, TERMINATED, CLOSED_PIPE = 1, 2, 130, 143, 141

# The state of the machine, not of our code: the user can put it right.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
                  errno.EFBIG, errno.ENAMETOOLONG}
OUT_OF_MEMORY = "out of memory: take a smaller batch, fewer tokens, or --dtype bfloat16"


def entry(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv   # known before parsing, so that a mistake in a parser can be debugged too
    try:
        signal.signal(signal.SIGTERM, _terminate)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")   # text may hold what the locale cannot
        status = _run(argv)
        _flush_results()        # here, where a closed pipe or a full disk is still ours to handle
    except BaseException as error:
        if debug and not isinstance(error, SystemExit | BrokenPipeError):
            _say(traceback.format_exc().rstrip())
        status = _status(error)
        try:
            _flush_results()    # what was finished before
        except OSError:
            # The interpreter flushes once more when it exits; let that go nowhere, quietly.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(argv: list[str]) -> int:
    args = parse(argv)
    if args.run is None:
        build_parser()[0].print_help(sys.stderr)
        return USER_ERROR
    _set_up_messages(debug=args.debug)
    if not args.no_compilation_cache:
        enable_compilation_cache()
    return args.run(args)


def _status(error: BaseException) -> int:
    """Say what happened on stderr, in one line where it is not our bug, and return the exit status."""
    match error:
        case SystemExit():      # argparse's --help and --version, and `_terminate`
            return error.code if isinstance(error.code, int) else 0
        case BrokenPipeError():
            return CLOSED_PIPE
        case KeyboardInterrupt():
            _say("qwen2-jax: interrupted")
            return INTERRUPTED
        case UserError():
            _say(f"qwen2-jax: error: {_one_line(error)}")
            return USER_ERROR
        case OSError() if error.errno in MACHINE_ERRORS:
            where = f": {error.filename}" if error.filename else ""
            _say(f"qwen2-jax: error: {error.strerror}{where}")
            return USER_ERROR
        case MemoryError():
            _say(f"qwen2-jax: error: {OUT_OF_MEMORY}")
            return USER_ERROR
        case Exception() if "RESOURCE_EXHAUSTED" in str(error):     # XLA's allocator, on any device
            _say(f"qwen2-jax: error: {OUT_OF_MEMORY} ({_one_line(error)})")
            return USER_ERROR
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    _say(f"qwen2-jax: bug: {type(error).__name__}{at}: {_one_line(error)}\n"
         "This is a mistake in qwen2_jax, not in your input. Please report it with this command line and the traceback "
         "that the same command prints with --debug.")
    return BUG


def _flush_results() -> None:
    if sys.stdout is not None:      # None where the process was started without one
        sys.stdout.flush()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:     # nobody reads stderr any more; the exit status still tells
        pass


def _terminate(signum, frame):
    """SIGTERM unwinds like Ctrl-C, so that temporary output is removed."""
    raise SystemExit(TERMINATED)


def _set_up_messages(*, debug: bool) -> None:
    """Our warnings as one line each; the libraries below speak only under `--debug`."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")     # XLA's own log, errors and worse
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for library in ("absl", "jax", "orbax", "tensorstore", "etils"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="qwen2-jax: %(message)s")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"qwen2_jax(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message, category, filename, lineno, file=None, line=None):
    _say(f"qwen2-jax: warning: {_one_line(message)}")
