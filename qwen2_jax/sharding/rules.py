"""The one table: on which mesh axis each logical axis of a parameter lives, and what becomes of it where it does not
divide.

Tensor and expert axes split what TABLE says, wherever the model's sizes allow it. The fsdp axes, and in training expert
for what is no expert's, then split each matrix along its outputs, its major dimension, below tensor where tensor lies
there too: gathered before use, so any rows will do. What cannot be split is replicated, and said once in the log
`qwen2_jax`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec as P

from qwen2_jax.config import ModelConfig
from qwen2_jax.sharding.axes import TENSOR, Axes

log = logging.getLogger("qwen2_jax")

TABLE: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "shared_ffn": "tensor",
    "expert_ffn": "tensor",
    "expert": "expert",
    "embed": None,
    "norm": None,
    "router": None,
    "hidden": None,
    "label": None,
}


def units(cfg: ModelConfig) -> dict[str, int]:
    """What each splittable logical axis consists of: heads are split whole."""
    sizes = {"vocab": cfg.vocab, "heads": cfg.heads, "kv_heads": cfg.kv_heads, "ffn": cfg.d_ff}
    if cfg.moe is not None:
        sizes |= {"shared_ffn": cfg.moe.d_shared, "expert_ffn": cfg.moe.d_expert, "expert": cfg.moe.experts}
    return sizes


@dataclass(frozen=True)
class Rules:
    """TABLE applied to one model on one mesh. Make it with `Rules.of`."""

    ax: Axes
    split: frozenset[str]
    """Logical axes that are split over their mesh axis."""
    kv_copies: int
    """Devices along `tensor` that share a key-value head: more than one where there are fewer heads than devices."""

    @property
    def head_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the heads of queries, and of the cache."""
        return self.split_over("heads")

    @classmethod
    def of(cls, cfg: ModelConfig, ax: Axes) -> Rules:
        return _rules(cfg, Axes(ax.sizes, spread_over=ax.spread_over))

    def split_over(self, logical: str) -> tuple[str, ...]:
        """The mesh axes that split a logical axis: none, or one."""
        return (TABLE[logical],) if logical in self.split else ()     # pyright: ignore[reportReturnType]

    def placement(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Mesh axes of each dimension of a parameter with these logical axes and this global shape, major first."""
        dims = [list(self.split_over(a)) for a in axes]
        if len(shape) >= 2:
            for name in self.ax.live(self.ax.spread_over):
                if any(name in dim for dim in dims):
                    continue
                for dim in (len(shape) - 2, len(shape) - 1):
                    if shape[dim] % (self.ax.size(dims[dim]) * self.ax.size((name,))) == 0:
                        dims[dim].append(name)
                        break
        return tuple(map(tuple, dims))

    def gathered(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Of `placement`, the axes that a dimension is gathered over before use."""
        return tuple(tuple(n for n in names if n not in self.split_over(a))
                     for a, names in zip(axes, self.placement(axes, shape), strict=True))

    def spec(self, axes: Sequence[str], shape: Sequence[int]) -> P:
        """`placement` as a partition spec."""
        return P(*(d if d else None for d in self.placement(axes, shape)))

    def local_shape(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a device's piece."""
        return tuple(n // self.ax.size(names)
                     for n, names in zip(shape, self.placement(axes, shape), strict=True))


@functools.lru_cache(maxsize=64)
def _rules(cfg: ModelConfig, ax: Axes) -> Rules:
    split = {name for name, n in units(cfg).items() if (axis := TABLE[name]) and ax.live((axis,))
             and n % ax.size((axis,)) == 0}
    tensor, copies = ax.size(TENSOR), 1
    # A device's query heads must find their keys on the device: all of its key-value heads are its own, or it has one.
    if "heads" in split and "kv_heads" not in split:
        if tensor % cfg.kv_heads == 0:
            copies = tensor // cfg.kv_heads
        else:
            split.remove("heads")
    if "heads" not in split:
        split.discard("kv_heads")
    for name, n in units(cfg).items():
        axis = TABLE[name]
        if axis and ax.live((axis,)) and name not in split and not (name == "kv_heads" and copies > 1):
            log.info("%s: %d cannot be split over %s=%d, so each device along it has all of them",
                     name, n, axis, ax.size((axis,)))
    return Rules(ax, frozenset(split), copies)
