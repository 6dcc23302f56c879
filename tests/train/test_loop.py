"""Order of events in the loop, with a step that only counts."""

from __future__ import annotations

import time

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.train.loop import Hook, fit


class Recorder(Hook):
    def __init__(self, events, due=()):
        self.events, self.steps = events, due

    def due(self, step, last):
        return last if self.steps == "last" else step in self.steps

    def after_step(self, step, state):
        self.events.append(("after", step, state))

    def on_metrics(self, step, metrics):
        self.events.append(("metrics", step, metrics["loss"]))

    def close(self):
        self.events.append("closed")


class Lazy:
    """A metric that notes when it is read."""

    def __init__(self, value, events):
        self.value, self.events = value, events

    def __float__(self):
        self.events.append(("read", self.value))
        return float(self.value)


def counting(events):
    def step(state, batch):
        events.append(("dispatch", batch))
        return state + batch, {"loss": Lazy(batch, events)}

    return step


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read():
    events = []
    state = fit(0, counting(events), iter([10, 20, 30, 40]), stop=3, hooks=[Recorder(events)])
    assert state == (60, 3)
    assert events == [("dispatch", 10),
                      ("dispatch", 20), ("read", 10), ("metrics", 1, 10.0),
                      ("dispatch", 30), ("read", 20), ("metrics", 2, 20.0),
                      ("read", 30), ("metrics", 3, 30.0), "closed"]


def test_who_takes_the_state_of_a_step_has_heard_of_it_before():
    events = []
    fit(0, counting(events), [10, 20, 30], stop=3, hooks=[Recorder(events, due=[2])])
    assert events == [("dispatch", 10),
                      ("dispatch", 20), ("read", 10), ("metrics", 1, 10.0),
                      ("read", 20), ("metrics", 2, 20.0), ("after", 2, 30),
                      ("dispatch", 30), ("read", 30), ("metrics", 3, 30.0), "closed"]


def test_a_loop_that_is_told_to_stop_ends_as_one_that_is_done():
    events = []
    source = iter([10, 20, 30])
    assert fit(0, counting(events), source, stop=3, hooks=[Recorder(events, due="last")],
               stopped=lambda step: step == 2) == (30, 2)
    assert events[-5:] == [("metrics", 1, 10.0), ("read", 20), ("metrics", 2, 20.0), ("after", 2, 30), "closed"]
    assert next(source) == 30


def test_time_waited_for_data_is_told_apart():
    def slow():
        for n in range(2):
            time.sleep(0.05)
            yield n

    waited, took = [], []

    class Times(Hook):
        def on_metrics(self, step, metrics):
            waited.append(metrics["time_data"])
            took.append(metrics["time_step"])

    fit(0, counting([]), slow(), stop=2, hooks=[Times()])
    assert min(waited) >= 0.05 and sum(took) >= sum(waited)


def test_one_batch_is_taken_for_each_update():
    source = iter(range(10))
    fit(0, counting([]), source, start=4, stop=7)
    assert next(source) == 3


def test_steps_are_numbered_from_start():
    events = []
    fit(0, counting(events), range(1, 9), start=4, stop=6, hooks=[Recorder(events)])
    assert [e[1] for e in events if e[0] == "metrics"] == [5, 6]


def test_nothing_to_do():
    events = []
    assert fit(7, counting(events), [], start=3, stop=3, hooks=[Recorder(events)]) == (7, 3)
    assert events == ["closed"]


def test_data_that_ends_early_is_said_and_hooks_are_closed():
    events = []
    with pytest.raises(UserError, match="ended after 2 of 5 steps"):
        fit(0, counting(events), [1, 2], stop=5, hooks=[Recorder(events)])
    assert events[-1] == "closed"
