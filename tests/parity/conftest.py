"""Comparisons with transformers: all marked, with oracles made once."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.oracle import answer, assert_telling, random_model, random_rows, tensors, to_params
from tests.parity.cases import CASES


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Torch's threads wait for each other: on models this small that takes longer than the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle():
    """`oracle(case)` → (transformers model, its weights as our tree, rows, its answer)."""

    @functools.cache
    def make(case: str):
        cfg = CASES[case]
        model, rows = random_model(cfg), random_rows(cfg)
        assert_telling(model, rows)
        return model, to_params(tensors(model), cfg), rows, answer(model, cfg, rows)

    return make
