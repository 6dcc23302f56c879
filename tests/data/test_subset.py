from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from qwen2_jax.data.subset import Subset


def source(documents):
    return SimpleNamespace(lengths=np.arange(documents, dtype=np.uint32) + 2, manifest_hash="a", vocab=9, end_token=1,
                           tokens=lambda document, start, stop: np.full(stop - start, document))


@pytest.mark.parametrize(("documents", "share", "expected"), [(10, 0.2, [4, 9]), (10, 0.0, []), (3, 0.1, []),
                                                             (7, 1 / 3, [2, 5]), (4, 0.5, [1, 3])])
def test_both_parts_are_the_whole(documents, share, expected):
    held, rest = (Subset(source(documents), share, held_out=held) for held in (True, False))
    assert held.documents.tolist() == expected
    assert sorted([*held.documents, *rest.documents]) == list(range(documents))
    assert held.lengths.tolist() == [n + 2 for n in expected]
    assert all(held.tokens(i, 1, 3).tolist() == [n, n] for i, n in enumerate(expected))


def test_each_part_has_a_name_of_its_own():
    parts = [Subset(source(10), share, held_out=held) for share in (0.1, 0.2) for held in (True, False)]
    assert len({part.manifest_hash for part in parts}) == 4


def test_a_worker_gets_the_rule_and_not_the_list():
    whole = SimpleNamespace(lengths=np.arange(1000), manifest_hash="a", vocab=9, end_token=1)
    part = Subset(whole, 0.1, held_out=True)
    assert len(part.documents) == 100
    copy = pickle.loads(pickle.dumps(part))
    assert copy.documents.tolist() == part.documents.tolist()
    assert "documents" not in pickle.loads(pickle.dumps(part)).__dict__
