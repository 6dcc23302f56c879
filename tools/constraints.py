"""Resolve the project's dependencies anew and write constraints/py311.txt and py312.txt.   make constraints

Asks pip of each Python what it would install for the core with the `dev` and `plots` extras, and writes those versions,
nothing else: neither where they came from nor what this machine is. Needs both interpreters.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12")
# Torch names its accelerator libraries by exact version itself, and other builds of the same torch need none of them.
OF_TORCH = ("nvidia-", "cuda-", "triton")


def resolve(version: str) -> dict[str, str]:
    """Name → version of everything that the project and its extras need on Python `version`."""
    found = subprocess.run([ROOT / "tools" / "find_python.sh", version], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(found.returncode)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([found.stdout.strip(), "-m", "pip", "--disable-pip-version-check", "install", "-qq",
                        "--dry-run", "--ignore-installed", "--report", report, f"{ROOT}[dev,plots]"], check=True)
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}
    return {name: number.partition("+")[0] for name, number in sorted(versions.items())
            if name != "qwen2-jax" and not name.startswith(OF_TORCH)}


def main() -> None:
    for version in VERSIONS:
        path = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
        lines = [f"# Exact versions tested on Python {version}; regenerate with `make constraints`.",
                 *(f"{name}=={number}" for name, number in resolve(version).items())]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(lines) - 1} packages")


if __name__ == "__main__":
    main()
