"""SIGKILL while a checkpoint is saved costs no more than that checkpoint."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

POINTS = ("after_temporary_folder:2", "mid_write:2", "before_rename:1", "after_rename:2", "before_digest:3",
          "after_digest:1", "during_retention:1")
SECONDS = ("0.02", "0.09", "0.17", "0.31")


def test_what_was_committed_is_there(process_env, tmp_path):
    """At each point of a save, and at other times: `killing` says what is checked after each."""
    done = subprocess.run([sys.executable, "-m", "tests.checkpoint.killing", tmp_path / "run", *POINTS, *SECONDS],
                          cwd=ROOT, env=process_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr
