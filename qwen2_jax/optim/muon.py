"""Muon (Jordan and others 2024): steps of equal size in all directions of a matrix, for matrices that multiply hidden
states; AdamW for the rest.

Not `optax.contrib.muon`: there, Nesterov's two terms are corrected for their bias by different factors, which no other
implementation does; axes of layers and experts become one, for which experts that lie on many devices are gathered to
each; and its state has gaps where a parameter is AdamW's, so that it can neither be placed like the parameters nor move
between their layouts. What it and this share is compared in the tests.

Letters: R layers of a run, E experts, O outputs, I inputs; M the smaller of O and I, N the larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax.optim.adamw import AdamWConfig, axes_of, decays
from qwen2_jax.optim.moments import stored_in
from qwen2_jax.optim.schedules import need, need_choice, need_positive, need_range, need_whole
from qwen2_jax.shapes import logical_axes

RateAdjustment = Literal["match_rms_adamw", "original"]
OrthogonalDtype = Literal["bfloat16", "float32"]
NORM_EPS = 1e-7     # torch.optim.Muon's


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamWConfig):
    """Muon for every matrix of attention, feed-forward and experts, each layer's and each expert's on its own; AdamW
    for embeddings, head, norm scales, biases, and routers, whose rows stand for experts as a head's stand for tokens.

    m ← momentum m + (1 - momentum) g, in `nesterov` u = momentum m + (1 - momentum) g, else u = m;
    p ← p - lr (ratio · orthogonal(u) + weight_decay p), as in `torch.optim.Muon`.
    """

    matrix_peak: float | None = None
    """Highest learning rate of Muon's matrices; none: `peak`. Both follow the same schedule."""
    rate_adjustment: RateAdjustment = "match_rms_adamw"
    """How the shape [O, I] enters the rate: `match_rms_adamw` 0.2 √max(O, I), with which AdamW's rate and decay serve
    (Liu and others 2025); `original` √max(1, O / I), for which rates are about 0.02."""
    momentum: float = 0.95
    """Share of a matrix's momentum that is kept each update."""
    nesterov: bool = True
    """Look one update ahead along the momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """a, b, c of an iteration X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X."""
    ns_dtype: OrthogonalDtype = "bfloat16"
    """What matrices travel in and are multiplied in meanwhile."""

    def __post_init__(self):
        super().__post_init__()
        if self.matrix_peak is not None:
            need_positive(self, "matrix_peak")
        need_choice(self, "rate_adjustment", RateAdjustment)
        need_range(self, "momentum", 0, 1, open_end=True)
        need(isinstance(self.nesterov, bool), f"nesterov must be True or False, found {self.nesterov!r}")
        need_whole(self, "ns_steps", 1)
        need(isinstance(self.ns_coefficients, tuple) and len(self.ns_coefficients) == 3
             and all(isinstance(c, int | float) and math.isfinite(c) for c in self.ns_coefficients),
             f"ns_coefficients must be three numbers, found {self.ns_coefficients!r}")
        need_choice(self, "ns_dtype", OrthogonalDtype)

    def descent(self, where: Any = None) -> optax.GradientTransformation:
        parts = [stored_in(self.moments, _muon_and_adam(self, where)),
                 optax.add_decayed_weights(self.weight_decay, mask=decays)]
        if self.matrix_peak is not None:
            ratio = self.matrix_peak / self.peak
            parts.append(optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
                lambda path, u: ratio * u if is_muons(path) else u, updates)))
        return optax.chain(*parts)


def is_muons(path: tuple) -> bool:
    """Whether the parameter at a path of JAX's is a matrix of a layer, and no router."""
    axes = axes_of(path)
    in_layer = "layers" in logical_axes("/".join(part.key for part in path))
    return in_layer and len(axes) - ("expert" in axes) == 2 and "router" not in axes


def _muon_and_adam(cfg: MuonConfig, where: Any) -> optax.GradientTransformation:
    """Gradients → directions. The state is AdamW's, so that all that handles the one handles the other: `mu` holds the
    momentum of Muon's matrices, of which `nu` holds nothing: arrays [R, O, 0]."""
    scaled = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)

    def init(params):
        state: Any = scaled.init(params)
        nu = jax.tree_util.tree_map_with_path(lambda path, v: v[..., :0] if is_muons(path) else v, state.nu)
        return state._replace(nu=nu)

    def update(updates, state: Any, params=None):
        paths, tree = jax.tree_util.tree_flatten_with_path(updates)
        muons = [is_muons(path) for path, _ in paths]
        g, m, v = ([leaf for _, leaf in paths], *map(tree.flatten_up_to, (state.mu, state.nu)))
        at = [None] * len(g) if where is None else tree.flatten_up_to(where)
        rest = [i for i, muon in enumerate(muons) if not muon]
        new: Any
        out: Any
        out, new = scaled.update(_pick(g, rest), state._replace(mu=_pick(m, rest), nu=_pick(v, rest)))
        for i, *found in zip(rest, out, new.mu, new.nu, strict=True):
            g[i], m[i], v[i] = found
        for i, muon in enumerate(muons):
            if not muon:
                continue
            m[i] = cfg.momentum * m[i] + (1 - cfg.momentum) * g[i]
            u = cfg.momentum * m[i] + (1 - cfg.momentum) * g[i] if cfg.nesterov else m[i]
            with jax.named_scope("muon"):
                g[i] = _ratio(cfg, u.shape) * orthogonal(u, cfg, at[i]).astype(u.dtype)
        return tree.unflatten(g), new._replace(mu=tree.unflatten(m), nu=tree.unflatten(v))

    return optax.GradientTransformation(init, update)


def _pick(leaves: list, indices: list[int]) -> list:
    return [leaves[i] for i in indices]


def _ratio(cfg: MuonConfig, shape: tuple[int, ...]) -> float:
    O, I = shape[-2:]
    return math.sqrt(max(1, O / I)) if cfg.rate_adjustment == "original" else 0.2 * math.sqrt(max(O, I))


def orthogonal(x_OI: jax.Array, cfg: MuonConfig, at: NamedSharding | None = None) -> jax.Array:
    """About U Vᵀ of each matrix U S Vᵀ of [R, (E,) O, I], in `cfg.ns_dtype`: Newton-Schulz iterations bring its
    singular values to between 0.68 and 1.21 (five iterations; those below 0.0015 of the matrix's norm end lower). A
    matrix of zeros stays.

    `at`: how the stack lies on a mesh. Iterating where it lies would gather, or sum, several times a matrix in each
    iteration; instead matrices are dealt out, each device gets whole ones of some layers, and gives them back. What
    cannot be dealt out, a stack of one, is left to the compiler.
    """
    x_OI = x_OI.astype(cfg.ns_dtype)
    if at is None or x_OI.shape[0] == 1:
        return _newton_schulz(x_OI, cfg)
    _, *middle, out, into = map(_names, (*at.spec, *(None,) * (x_OI.ndim - len(at.spec))))
    # One dimension after the other goes over to the layers: of each such move XLA makes an exchange, of two at once a
    # gather of everything.
    ways = [NamedSharding(at.mesh, PartitionSpec(layers, *middle, o, i))
            for layers, o, i in (((), out, into), (out, (), into), (out + into, (), ()))]
    R, share = x_OI.shape[0], math.prod(at.mesh.shape[name] for name in out + into)
    x_OI = jnp.pad(x_OI, ((0, -R % share), *((0, 0),) * (x_OI.ndim - 1)))
    for way in ways:
        x_OI = lax.with_sharding_constraint(x_OI, way)
    x_OI = _newton_schulz(x_OI, cfg)
    for way in reversed(ways):
        x_OI = lax.with_sharding_constraint(x_OI, way)
    return x_OI[:R]


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one dimension of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _newton_schulz(x_OI: jax.Array, cfg: MuonConfig) -> jax.Array:
    """Sums are float32 and rounded once. The polynomial is one of the *rounded* X Xᵀ, in both of its terms: with the
    exact one in the linear term, bfloat16 is wrong by 2.0 % instead of 1.2 %."""
    a, b, c = cfg.ns_coefficients

    def times(left, right):
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    tall = x_OI.shape[-2] > x_OI.shape[-1]
    wide_MN = (x_OI.mT if tall else x_OI).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide_MN), (-2, -1), keepdims=True))
    x_MN = (wide_MN / jnp.maximum(norm, NORM_EPS)).astype(x_OI.dtype)

    def iterate(_, x_MN):
        gram_MM = times(x_MN, x_MN.mT).astype(x_MN.dtype)
        step_MM = (b * gram_MM.astype(jnp.float32) + c * times(gram_MM, gram_MM)).astype(x_MN.dtype)
        return (a * x_MN.astype(jnp.float32) + times(step_MM, x_MN)).astype(x_MN.dtype)

    x_MN = lax.fori_loop(0, cfg.ns_steps, iterate, x_MN)
    return x_MN.mT if tall else x_MN
