"""Fine-grained experts cut out of a dense feed-forward network: pure arithmetic on numpy arrays.

Qwen2 report (arXiv 2407.10671), section 2.2.2: the network is replicated until its copies hold enough for all experts,
each copy is shuffled along the intermediate dimension, experts are cut out of the copies, the rest is discarded, and
half of each expert's parameters is drawn anew. `Upcycling` names what the report leaves open.

Shape letters: U units of the dense network, E experts, F units of an expert, D model, R rows asked for. A *unit* is one
place of the intermediate dimension: a row of gate, a row of up and a column of down, which always go together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from qwen2_jax.config import MoeConfig
from qwen2_jax.errors import UserError

Cut = Literal["across", "within"]
Reinit = Literal["elements", "units"]
Init = Literal["config", "matched"]
Shared = Literal["copy", "cut", "random"]
Part = Literal["gate", "up", "down"]

REINIT_SHARE = 0.5      # the report's


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How experts are made; the report leaves all of it open but `reinit_share`.

    Attributes:
      cut: `across`: experts are cut out of the copies laid end to end, so one may hold the end of a copy and the
        beginning of the next; ceil(E F / U) copies are enough, the report's number. `within`: each lies in one copy,
        whose last U mod F units are discarded, which takes more copies (10 for Qwen2-57B-A14B instead of 9).
      reinit: what is drawn anew of a routed expert. `elements`: each element of its three matrices by itself, with
        probability `reinit_share`. `units`: exactly round(reinit_share F) of its units, whole.
      reinit_share: None is a half, or nothing with `preserve`.
      init: standard deviation of what is drawn anew (normal, mean 0). `config`: initializer_range of config.json.
        `matched`: that of the dense matrix (one layer's gate, up or down) whose elements are replaced.
      shared: the shared expert. `copy`: it computes what the dense network does: all of its units, and units beyond
        them with a down projection of zero; if it is narrower, a random part of them. `cut`: cut out of the same copies
        after the routed experts, as pieces of their width, and in part drawn anew as they are. `random`: drawn anew.
      router_std: the router is drawn with it; None is initializer_range, or 0 with `preserve`.
      shared_gate_std: that of the shared expert's gate; at 0 the gate is half open for every token.
      seed: weights are a function of seed, options, sizes and source alone.
      preserve: the model computes what the dense one does: router zero, every expert chosen, down projections scaled
        for it (`n / times that a unit occurs`), that of the shared expert zero, nothing drawn anew.

    Raises UserError for a value out of range, or one that `preserve` excludes.
    """

    cut: Cut = "across"
    reinit: Reinit = "elements"
    reinit_share: float | None = None
    init: Init = "config"
    shared: Shared = "copy"
    router_std: float | None = None
    shared_gate_std: float = 0.0
    seed: int = 0
    preserve: bool = False

    def __post_init__(self):
        for name, kind in (("cut", Cut), ("reinit", Reinit), ("init", Init), ("shared", Shared)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise UserError(f"{name} {value!r} is not supported: {', '.join(get_args(kind))} are")
        if self.reinit_share is not None and not 0 <= self.reinit_share <= 1:
            raise UserError(f"reinit_share must lie between 0 and 1, found {self.reinit_share}")
        for name in ("router_std", "shared_gate_std"):
            std = getattr(self, name)
            if std is not None and not 0 <= std < math.inf:
                raise UserError(f"{name} must be a number of at least 0, found {std}")
        for name in ("reinit_share", "router_std"):
            if self.preserve and getattr(self, name):
                raise UserError(f"preserve keeps the dense model's output, which {name} {getattr(self, name)} would"
                                " change: leave one of the two out")

    @property
    def share(self) -> float:
        """The part of each routed expert's parameters that is drawn anew."""
        default = 0.0 if self.preserve else REINIT_SHARE
        return default if self.reinit_share is None else self.reinit_share


@dataclass(frozen=True)
class Expert:
    """One expert as units of the dense network."""

    units_F: np.ndarray
    """The dense unit that lies at each place."""
    fresh_F: np.ndarray
    """Whether a place's unit is drawn anew, whole (bool)."""
    share: float = 0.0
    """Probability of each other element to be drawn anew."""
    down_F: np.ndarray | None = None
    """Factors of the down projection's columns (float32); None is 1."""


def draws(seed: int, what: str, row: int = 0) -> np.random.Generator:
    """The random numbers of one row of `what`, which do not depend on what else was drawn: Philox is a function of a
    key, here seed and name, and of a counter, whose second word is the row."""
    key = np.frombuffer(hashlib.blake2b(f"{seed} {what}".encode(), digest_size=16).digest(), "<u8")
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, row, 0, 0], np.uint64)))


def permutation(seed: int, what: str, size: int) -> np.ndarray:
    """A random order of `size` things."""
    return np.argsort(draws(seed, what).bit_generator.random_raw(size), kind="stable")


def copies_needed(width: int, experts: int, expert_width: int, cut: Cut) -> int:
    """Copies of a network of `width` units that hold so many experts. Raises UserError where none can."""
    if cut == "across":
        return math.ceil(experts * expert_width / width)
    if expert_width > width:
        raise UserError(f"an expert of width {expert_width} cannot be cut within a copy of the dense network, whose"
                        f" width is {width}: take cut across")
    return math.ceil(experts / (width // expert_width))


def cut_units(width: int, experts: int, expert_width: int, cut: Cut, copy: Callable[[int], np.ndarray]) -> np.ndarray:
    """The dense units of every expert, [E, F]; `copy(c)` are the units of copy c in its order, [U]."""
    copies = [copy(c) for c in range(copies_needed(width, experts, expert_width, cut))]
    if cut == "within":
        copies = [units_U[:width // expert_width * expert_width] for units_U in copies]
    return np.concatenate(copies)[:experts * expert_width].reshape(experts, expert_width)


def layer_experts(how: Upcycling, moe: MoeConfig, width: int, layer: int) -> tuple[list[Expert], Expert]:
    """The routed experts of a layer and its shared one; `width` is the dense network's."""
    units_EF = cut_units(width, _cut_count(how, moe), moe.d_expert, how.cut,
                         lambda c: permutation(how.seed, f"layer {layer} copy {c}", width))
    routed_EF = units_EF[:moe.experts]
    factor_U = None
    if how.preserve:    # a unit that occurs m times, each weighted 1/n by the router, counts once
        factor_U = (moe.experts / np.maximum(occurrences(routed_EF, width), 1)).astype(np.float32)
    routed = [_drawn_in_part(how, units_F, f"layer {layer} expert {e}", None if factor_U is None else factor_U[units_F])
              for e, units_F in enumerate(routed_EF)]
    return routed, _shared(how, moe, width, layer, units_EF[moe.experts:].reshape(-1))


def occurrences(units_EF: np.ndarray, width: int) -> np.ndarray:
    """How many times each dense unit occurs in the experts, [U]."""
    return np.bincount(units_EF.reshape(-1), minlength=width)


def layer_copies(how: Upcycling, moe: MoeConfig, width: int) -> int:
    """Copies of the dense network that `layer_experts` cuts up."""
    return copies_needed(width, _cut_count(how, moe), moe.d_expert, how.cut)


def expert_rows(part: Part, expert: Expert, start: int, stop: int, dense: np.ndarray, std: float,
                draw: Callable[[int], np.random.Generator], dtype: Any) -> np.ndarray:
    """Rows [start, stop) of one of an expert's matrices, in `dtype`: gate and up are [F, D], down is [D, F].

    `dense` is the whole matrix it comes from ([U, D] or [D, U]), `std` that of elements drawn anew, `draw(row)` gives
    each row its own random numbers. Elements that are not drawn anew keep their bits, unless `expert.down_F` scales.
    """
    down = part == "down"
    rows_RX = dense[start:stop].take(expert.units_F, axis=1) if down else dense[expert.units_F[start:stop]]
    rows_RX = rows_RX.astype(dtype, copy=False)
    any_fresh = expert.fresh_F.any()
    for row in range(start, stop) if expert.share or any_fresh else ():
        fresh = expert.fresh_F if down else expert.fresh_F[row]     # [F], or of the whole row
        if expert.share or fresh.any():
            _draw_anew(rows_RX[row - start], fresh, expert.share, std, draw(row))
    if down and expert.down_F is not None:
        scaled_RX = rows_RX.astype(np.float32) * expert.down_F
        rows_RX = np.where(expert.down_F == 0, 0, scaled_RX).astype(dtype)      # no -0, nor NaN of what is infinite
    return rows_RX


def normal_rows(start: int, stop: int, size: int, std: float, draw: Callable[[int], np.random.Generator],
                dtype: Any) -> np.ndarray:
    """Rows [start, stop) of a matrix of `size` columns, all drawn."""
    return np.stack([_normal(draw(row), size, std) for row in range(start, stop)]).astype(dtype)


def _cut_count(how: Upcycling, moe: MoeConfig) -> int:
    return moe.experts + (math.ceil(moe.d_shared / moe.d_expert) if how.shared == "cut" else 0)


def _drawn_in_part(how: Upcycling, units_F: np.ndarray, name: str, down_F: np.ndarray | None) -> Expert:
    fresh_F = np.zeros(len(units_F), bool)
    if how.reinit == "elements":
        return Expert(units_F, fresh_F, how.share, down_F)
    fresh_F[permutation(how.seed, f"{name} units", len(units_F))[:round(how.share * len(units_F))]] = True
    return Expert(units_F, fresh_F, down_F=down_F)


def _shared(how: Upcycling, moe: MoeConfig, width: int, layer: int, cut_F: np.ndarray) -> Expert:
    size, name = moe.d_shared, f"layer {layer} shared expert"
    down_F = np.zeros(size, np.float32) if how.preserve else None
    if how.shared == "cut":
        return _drawn_in_part(how, cut_F[:size], name, down_F)
    if how.shared == "random":
        return Expert(np.zeros(size, np.int64), np.ones(size, bool), down_F=down_F)
    if size < width:
        return Expert(permutation(how.seed, name, width)[:size], np.zeros(size, bool), down_F=down_F)
    beyond_F = np.arange(size) >= width
    return Expert(np.where(beyond_F, 0, np.arange(size)), beyond_F,
                  down_F=down_F if how.preserve or size == width else np.where(beyond_F, 0, 1).astype(np.float32))


def _draw_anew(row_X: np.ndarray, fresh: np.ndarray, share: float, std: float, rng: np.random.Generator) -> None:
    """Draws the fresh elements of a row, and each other with probability `share`, in place."""
    anew_X = np.broadcast_to(fresh, row_X.shape)
    if share:
        bits_X = rng.bit_generator.random_raw(math.ceil(len(row_X) / 4)).view(np.uint16)[:len(row_X)]
        anew_X = anew_X | (bits_X < round(share * 2**16))
    places = np.flatnonzero(anew_X)     # half the time of drawing all and choosing by `where`
    row_X[places] = _normal(rng, len(places), std).astype(row_X.dtype)


def _normal(rng: np.random.Generator, size: int, std: float) -> np.ndarray:
    return rng.standard_normal(size, dtype=np.float32) * np.float32(std) if std else np.zeros(size, np.float32)
