"""Schedules by their definition, and refusals."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.errors import UserError
from qwen2_jax.optim.schedules import ScheduleConfig, schedule


def config(**changes) -> ScheduleConfig:
    return ScheduleConfig(**(dict(peak=1.0, steps=100, warmup=10, final=0.1) | changes))


EXPECTED = {
    "cosine": {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 77: 0.55 + 0.45 * math.cos(math.pi * 67 / 90), 100: 0.1},
    "linear": {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 77: 1 - 0.9 * 67 / 90, 100: 0.1, 200: 0.1},
    "constant": {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0, 1000: 1.0},
    "wsd": {0: 0.1, 9: 1.0, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1},
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_schedule(kind):
    rate = schedule(config(schedule=kind, decay=20))
    for n, value in EXPECTED[kind].items():
        assert float(rate(n)) == pytest.approx(value, rel=1e-5), n


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(sorted(EXPECTED)), warmup=st.integers(0, 50), final=st.floats(0, 1))
def test_rates_rise_to_the_peak_and_never_again(kind, warmup, final):
    rates = np.asarray(schedule(config(schedule=kind, warmup=warmup, final=final, decay=30))(jnp.arange(120)))
    assert (np.diff(rates[:warmup]) > 0).all() and rates.max() == pytest.approx(1.0)
    assert (np.diff(rates[warmup:]) <= 1e-6).all() and rates.min() >= 0


REFUSED = {
    "schedule": ("step", "cosine, linear, constant, wsd"), "peak": (0.0, "peak"), "final": (1.5, "final"),
    "steps": (0, "steps"), "warmup": (101, "warmup 101"), "decay": (-1, "decay"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refusals_name_the_field(field):
    value, message = REFUSED[field]
    with pytest.raises(UserError, match=message):
        config(**{field: value})


@pytest.mark.parametrize("changes", [{"steps": 1e3}, {"warmup": True}, {"peak": "1e-3"}, {"final": math.nan}])
def test_a_value_of_another_kind_is_refused(changes):
    with pytest.raises(UserError, match=rf"{next(iter(changes))} must be .*, found"):
        config(**changes)


def test_wsd_needs_a_decay():
    with pytest.raises(UserError, match="decay between 1 and steps - warmup = 90, found 0"):
        config(schedule="wsd")
