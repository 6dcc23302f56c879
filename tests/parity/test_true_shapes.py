"""Real widths: the whole of Qwen2-0.5B and a layer of the 7B, each framework in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.parity_big import BIG, SHAPES, TOLERANCE, compare, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in BIG])
def test_true_shape(name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    row = compare(name)
    assert row["logits_std"] >= 1
    assert row["logits_error"] <= TOLERANCE[name] and row["hidden_error"] <= TOLERANCE[name], row
    assert row["top1_agreement"] == 1


def test_checked_in_result_of_the_large_slices():
    """The report in the documentation belongs to its data, holds both slices, and is within today's tolerances."""
    rows = json.loads((ROOT / "docs/parity_big.json").read_text())
    assert tuple(row["shape"] for row in rows) == BIG
    table = (ROOT / "docs/parity_big.md").read_text()
    for row in rows:
        assert max(row["logits_error"], row["hidden_error"]) <= TOLERANCE[row["shape"]]
        assert row["parameters"] > 9e8 and row["top1_agreement"] == 1
    assert table.splitlines()[-len(rows):] == report(rows).splitlines()[-len(rows):]
