"""A training run's curves as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def draw_loss_curve(path: Path, losses: Mapping[int, float], held_out: Mapping[int, float],
                    levels: Mapping[str, float]) -> bool:
    """Two panels: training loss (nats a token) by step; bits per byte on held-out text by step, with named levels.

    False, and no file, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")   # needs no display
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    left.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.7)
    left.plot(steps, _running_mean(values), color="tab:blue")
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.plot(list(held_out), list(held_out.values()), "o-", color="tab:blue", label="model")
    for (name, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        right.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{name} {level:.2f}")
    right.set(xlabel="step", ylabel="held-out text, bits per byte")
    right.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _running_mean(values: Sequence[float] | np.ndarray, share: float = 0.03) -> np.ndarray:
    """Mean over a window of `share` of all steps, cut at both ends."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
