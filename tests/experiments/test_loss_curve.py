from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments.loss_curve import _running_mean, draw_loss_curve


def test_running_mean():
    np.testing.assert_allclose(_running_mean([1.0, 2.0, 6.0, 3.0], share=0.5), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(_running_mean([4.0, 2.0]), [4.0, 2.0])


def test_a_png_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_loss_curve(tmp_path / "loss.png", {1: 5.0, 2: 4.0}, {2: 3.1}, {"byte trigram": 2.5, "xz": 1.7})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_no(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw_loss_curve(tmp_path / "loss.png", {1: 5.0}, {1: 3.1}, {})
    assert not (tmp_path / "loss.png").exists()
