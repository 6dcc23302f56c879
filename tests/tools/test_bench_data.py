"""The measurement of the data stream runs and says what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_one_json_line(process_env):
    command = [sys.executable, "-m", "tools.bench_data", "--documents", "300", "--seq", "64", "--seconds", "0.01"]
    done = subprocess.run(command, env=process_env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["tokens_per_second"] > 0 and found["tokens_per_cpu_second"] > 0
    assert (found["documents"], found["padding"], found["far_plans"]) == (300, 0, 1)
