"""Four kills of a small run: the tool makes fifty."""

from __future__ import annotations

import pytest

from tools.torture import Kill, Torture, report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def torture(tmp_path_factory):
    return Torture(tmp_path_factory.mktemp("torture"), seed=0)


def test_a_run_that_is_killed_four_times_has_the_same_losses(torture, tmp_path):
    """In the middle of a line, of a checkpoint, of its commit, and of the removal of an old one."""
    kills = [Kill("during_metrics_write", 2), Kill("mid_write", 1), Kill("before_digest", 2),
             Kill("during_retention", 1)]
    hit, wrong = torture.trial(tmp_path / "run", kills)
    assert hit == 4 and wrong == []


def test_half_of_the_kills_fall_at_every_point(torture):
    kills = torture.kills(50)
    assert len(kills) == 50 and sum(bool(kill.point) for kill in kills) == 25
    assert len({kill.point for kill in kills if kill.point}) == 8


def test_another_loss_is_noticed(torture, monkeypatch):
    changed = [line | {"loss": line["loss"] + (line["step"] == 4) * 1e-7} for line in torture.expected]
    monkeypatch.setattr(torture, "expected", changed)
    assert torture.trial(torture.folder / "whole", [])[1] == ["the losses are not those of the run without a kill"]


def test_the_report_tells_what_failed():
    text = report([(Kill("mid_write", 1), 1, []), (Kill(seconds=2), 1, ["no"]), (Kill(seconds=9), 0, [])], 3.0, 7)
    assert "2 of 3 kills hit the run before it ended; 1 trials failed" in text
    assert "| mid_write:1 | the same losses, every bit |" in text and "| after 2.00 s | no |" in text
