"""XLA's ways of writing groups of devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.plan.groups import mesh_coordinates, parse_groups, varying
from qwen2_jax.plan.hlo import HloError


@pytest.mark.parametrize(("text", "groups"), [
    ("", [(0, 1, 2, 3)]),
    ("{}", [(0, 1, 2, 3)]),
    ("{{0,1},{2,3}}", [(0, 1), (2, 3)]),
    ("{{0,2},{3,1}}", [(0, 2), (3, 1)]),
    ("[2,2]<=[4]", [(0, 1), (2, 3)]),
    ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
    ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
    ("mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
    ("mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
    ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 1), (2, 3)]),
    ("mesh['a'=4], device_ids=([4]) {'a'}", [(0, 1, 2, 3)]),
    ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [(3, 2), (1, 0)]),
])
def test_forms(text, groups):
    assert parse_groups(text, 4) == groups


def test_an_unknown_form_is_refused():
    with pytest.raises(HloError, match="not known"):
        parse_groups("<=>", 4)


@given(st.permutations(range(3)), st.integers(1, 3))
def test_a_transposed_iota_is_numpys(order, split):
    """Against the definition: iota, reshaped, transposed, reshaped."""
    shape = (2, 3, 4)
    groups = int(np.prod([shape[i] for i in order][:split]))
    text = f"[{groups},{24 // groups}]<=[2,3,4]T({','.join(map(str, order))})"
    expected = np.arange(24).reshape(shape).transpose(order).reshape(groups, -1)
    assert parse_groups(text, 24) == [tuple(row) for row in expected.tolist()]


def test_axes_that_vary_within_a_group():
    grid = mesh_coordinates((2, 2, 3))
    assert grid[7] == (1, 0, 1)
    assert varying([(0, 1, 2), (3, 4, 5)], grid) == (2,)
    assert varying([(0, 6)], grid) == (0,)
    assert varying([(0, 3), (1, 2)], grid) == (1, 2), "different axes in different groups"
    assert varying([(5,)], grid) == ()
