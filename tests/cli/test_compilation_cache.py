"""A second start compiles nothing; a cache that cannot be written or was cut short costs a line, never a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qwen2_jax.cli.compilation_cache import WRITING_SECONDS, default_folder, enable_compilation_cache

pytestmark = pytest.mark.smoke

# Compiles two programs, one of them slow, and prints what JAX counted.
COMPILING = """
import collections, json, sys
from qwen2_jax.cli.compilation_cache import enable_compilation_cache
{before}
enable_compilation_cache()
import jax, jax.numpy as jnp
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
def loss(x):
    for _ in range(30):
        x = jnp.tanh(x @ x) + 1
    return x.sum()
total = float(jax.jit(jax.grad(loss))(jnp.eye(8)).sum()) + float(jnp.arange(3).sum())
print(json.dumps({{"hits": counts["cache_hits"], "misses": counts["cache_misses"], "total": total}}))
"""


@pytest.fixture
def compiling(process_env, tmp_path):
    def run(before: str = "", **env: str) -> tuple[dict, str]:
        done = subprocess.run([sys.executable, "-c", COMPILING.format(before=before)], text=True, capture_output=True,
                              env=process_env | {"QWEN2_JAX_CACHE": str(tmp_path / "cache")} | env, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


@pytest.mark.parametrize("before", ["", "import jax"], ids=["before jax", "after jax"])
def test_a_second_start_compiles_nothing(compiling, before):
    first, _ = compiling(before)
    second, stderr = compiling(before)
    assert first["misses"] > 1 and first["hits"] == 0
    assert second["misses"] == 0 and second["hits"] == first["misses"]
    assert second["total"] == first["total"]
    assert stderr == ""


def test_an_entry_cut_short_is_compiled_anew_once(compiling, tmp_path):
    first, _ = compiling()
    [folder] = (tmp_path / "cache").iterdir()
    entry = max(folder.glob("*-cache"), key=lambda path: path.stat().st_size)
    os.truncate(entry, entry.stat().st_size // 2)       # as a process killed while writing leaves it
    (folder / f"{entry.name.removesuffix('-cache')}-atime").unlink()
    long_ago = entry.stat().st_mtime - 2 * WRITING_SECONDS
    os.utime(entry, (long_ago, long_ago))
    mended, stderr = compiling()
    assert (mended["misses"], stderr) == (1, "")
    assert compiling()[0] == first | {"misses": 0, "hits": first["misses"]}


def test_an_entry_still_being_written_is_left_alone(compiling, tmp_path):
    compiling()
    [folder] = (tmp_path / "cache").iterdir()
    young = folder / "jit_f-0-cache"
    young.write_bytes(b"half")
    compiling()
    assert young.exists()


def test_where_it_cannot_be_written_it_is_a_line(compiling, tmp_path):
    (tmp_path / "file").write_text("")
    counts, stderr = compiling(QWEN2_JAX_CACHE=str(tmp_path / "file" / "cache"))
    assert counts["hits"] == 0
    assert stderr.count("\n") == 1 and "going on without a compilation cache" in stderr and "Not a directory" in stderr


def test_a_cache_that_the_user_chose_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    assert enable_compilation_cache(tmp_path / "ours") == tmp_path / "theirs"
    assert list(tmp_path.iterdir()) == []


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN2_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "qwen2_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "qwen2_jax" / "xla"
    monkeypatch.setenv("QWEN2_JAX_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
