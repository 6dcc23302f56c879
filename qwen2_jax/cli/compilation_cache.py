"""JAX's persistent compilation cache, where the user's caches live: a second start compiles nothing.

JAX writes an entry in place and marks it complete afterwards (an `-atime` file, when the cache is bounded). A process
killed between the two leaves an entry that JAX would read, fail on and never replace, so we remove those first.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from pathlib import Path

MAX_BYTES = 4 << 30
SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # even the small programs: "compiles nothing" is then exact
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
WRITING_SECONDS = 60.0  # an unmarked entry younger than this may be another process's, still being written


def enable_compilation_cache(folder: Path | None = None) -> Path | None:
    """Turn the cache on and return its folder; where it cannot be written, say so on stderr and return None.

    Works before and after JAX is imported, but must come before the first compilation. A cache that the user set up
    with `JAX_COMPILATION_CACHE_DIR` is left alone.

    Args:
      folder: default `$QWEN2_JAX_CACHE`, else `$XDG_CACHE_HOME/qwen2_jax/xla`, else `~/.cache/qwen2_jax/xla`.
    """
    if theirs := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(theirs)
    folder = (folder or default_folder()) / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_incomplete(folder)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        print(f"qwen2-jax: going on without a compilation cache: cannot write {folder}: {error.strerror}; "
              "QWEN2_JAX_CACHE names another folder", file=sys.stderr)
        return None
    settings = {"jax_compilation_cache_dir": str(folder)} | SETTINGS
    if "jax" in sys.modules:
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)
    else:
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    return folder


def default_folder() -> Path:
    if ours := os.environ.get("QWEN2_JAX_CACHE"):
        return Path(ours).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2_jax" / "xla"


def _processor() -> str:
    """A name for this kind of processor. JAX's key does not hold the CPU's features, so a home folder shared by
    unlike machines would hand one the other's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _remove_incomplete(folder: Path) -> None:
    for entry in folder.glob("*-cache"):
        mark = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        if not mark.exists() and time.time() - entry.stat().st_mtime > WRITING_SECONDS:
            entry.unlink(missing_ok=True)
