"""What every test gets: eight CPU devices, strict shapes and dtypes, a compilation cache, seconds per file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES = "--xla_force_host_platform_device_count=8"

# Ctrl-C as in a terminal, here and in the processes that tests start, also where a shell started the tests in the
# background, and so with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when JAX starts, hence set before its import.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from qwen2_jax.cli.compilation_cache import enable_compilation_cache  # noqa: E402
from qwen2_jax.plan.compiled import no_cache  # noqa: E402

# Adding [D] to [B, T, D] must be written out, and bfloat16 must never turn into float32 unasked.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
OPTAX_ROOMS = ("optim", "train", "experiments")     # Optax multiplies a Python float by an int32 count
enable_compilation_cache(ROOT / ".pytest_cache" / "jax")

# No deadline, since a busy machine is not a failure; the same examples on every machine, unless one goes searching with
# `pytest --hypothesis-profile=search`.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("tests")

seconds_by_file: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report):
    """Setup, call and teardown all count for the file."""
    seconds_by_file[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per file")
    for file, seconds in sorted(seconds_by_file.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(seconds_by_file.values()):8.1f}  all")


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Strict, except in the rooms whose tests run Optax's updates and in tests marked `optax`."""
    room = request.path.relative_to(ROOT / "tests").parts[0]
    optax = room in OPTAX_ROOMS or "optax" in request.keywords
    with jax.numpy_dtype_promotion("standard" if optax else "strict"):
        yield


@pytest.fixture
def no_compilation_cache():
    with no_cache():
        yield


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository, which a user's clone does not have."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no reference data at ../shared")
    return folder


@pytest.fixture(scope="session")
def process_env(tmp_path_factory) -> dict[str, str]:
    """The environment of a user's process: one CPU device, no strictness, a compilation cache of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "QWEN2_JAX_"))}
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace(DEVICES, "").strip()
    cache = tmp_path_factory.mktemp("cache")
    return env | {"JAX_PLATFORMS": "cpu", "QWEN2_JAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def run_cli(process_env):
    """`run_cli("info", folder)`: the command in a process of its own, as a user starts it."""

    def run(*argv: object, **options) -> subprocess.CompletedProcess[str]:
        options = {"env": process_env, "text": True, "capture_output": True, "stdin": subprocess.DEVNULL,
                   "timeout": 300} | options
        return subprocess.run([sys.executable, "-m", "qwen2_jax", *map(str, argv)], **options)

    return run
