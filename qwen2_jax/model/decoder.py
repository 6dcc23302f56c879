"""The decoder: embedding, runs of blocks, final norm, head weights.

Shape letters: B rows on this device, T tokens, D model, h half a head's width, L layers, R layers of one run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import LayerRun, ModelConfig, Remat
from qwen2_jax.errors import UserError
from qwen2_jax.model.attention import Attention, Context
from qwen2_jax.model.heads import Head, table, vocab_split
from qwen2_jax.model.mlp import Mlp
from qwen2_jax.model.moe import Moe
from qwen2_jax.model.params import ones, unstack, weight
from qwen2_jax.ops.dot import PRODUCT
from qwen2_jax.ops.exchange import ExpertExchange
from qwen2_jax.ops.experts import RouterStats
from qwen2_jax.ops.flash import ATTENDED
from qwen2_jax.ops.norm import rms_norm
from qwen2_jax.ops.quant import Quant, quantize, quantized_specs
from qwen2_jax.ops.rope import rope_tables
from qwen2_jax.ops.vocab import embed
from qwen2_jax.sharding.axes import BATCH, CONTEXT, FSDP, TENSOR, Axes
from qwen2_jax.sharding.mesh import shardings
from qwen2_jax.sharding.order import row_slots
from qwen2_jax.sharding.rules import Rules
from qwen2_jax.sharding.split import Split

KEPT = {"attention": (ATTENDED,), "dots": (ATTENDED, PRODUCT)}
"""Names that each remat policy keeps beside the blocks' inputs."""


class DecoderOutput(NamedTuple):
    x_BTD: jax.Array
    """Hidden states after the final norm, compute dtype. With whole rows on a mesh, this device's tokens [B, t, D]."""
    head: dict[str, jax.Array]
    """The head's weights as this device sees them; `head["table"]` is the embedding when tied."""
    vocab: Split
    """How `head["table"]` is split: for `ops.vocab`."""
    cache: dict | None
    router: RouterStats | None
    """Sums over layers and the counted tokens of this device's rows; None for dense models."""
    hidden_LBTD: jax.Array | None
    """Each block's output, when asked for."""


class Norm(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD):
        return rms_norm(x_BTD, weight(self, "scale", x_BTD.shape[-1:], ("norm",), ones), self.cfg.norm_eps)


class Block(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any
    train: bool
    sparse: bool
    collect: bool
    expert_exchange: ExpertExchange

    @nn.compact
    def __call__(self, carry, context: Context, counts_BT, layer_inputs):
        x_BTD, cache, router = carry
        layer, windowed = layer_inputs
        common = (self.cfg, self.ax, self.dtype)
        with jax.named_scope("attention"):
            attended, cache = Attention(*common, name="attn")(
                Norm(*common, name="attn_norm")(x_BTD), context, windowed, layer, cache)
            x_BTD = x_BTD + attended
        with jax.named_scope("moe" if self.sparse else "mlp"):
            h_BTD = Norm(*common, name="mlp_norm")(x_BTD)
            if self.sparse:
                y_BTD, stats = Moe(*common, self.train, self.expert_exchange, name="moe")(h_BTD, counts_BT)
                router = jax.tree.map(jnp.add, router, stats)
            else:
                y_BTD = Mlp(*common, name="mlp")(h_BTD)
            x_BTD = x_BTD + y_BTD
        return (x_BTD, cache, router), (x_BTD if self.collect else None)


class Embed(nn.Module):
    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self):
        return table(self)


class Decoder(nn.Module):
    """A Qwen2 decoder on one device's rows. Field `stacked` must match the parameter tree (`ModelConfig.layer_runs`).

    `train=False` lets the platform choose expert products that need no gradient. `remat`: `none`; `full` keeps only
    the blocks' inputs; `attention` also what a kernel for it leaves (`ops/flash.py`; nothing where the reference runs);
    `dots` products with weights as well, but not scores, which grow with T squared. `expert_exchange`: how tokens
    reach their experts on a mesh (`ops/exchange.py`).
    """

    cfg: ModelConfig
    ax: Axes = Axes()
    dtype: Any = jnp.float32
    stacked: bool = True
    train: bool = True
    remat: Remat = "none"
    collect: bool = False
    expert_exchange: ExpertExchange = "auto"

    @nn.compact
    def __call__(self, ids_BT, *, positions_BT=None, segments_BT=None, cache: dict | None = None, start: Any = None,
                 long_B=None) -> DecoderOutput:
        """Hidden states of int32 tokens [B, T].

        Whole rows: `segments_BT` (0 is padding) and `positions_BT` (restarting at each segment) describe packed or
        padded rows; without them a row is one segment from position 0. Where context splits a row, tokens lie as
        `ax.balanced` says. With a cache: tokens go to slots and positions start … start+T-1 of their row, `start` an
        int32 scalar or, for T = 1, [B].

        `long_B` bool [B], for `rope_when` "long": whole rows find it out themselves (a row is long when one of its
        tokens stands at `original_max_position` or beyond); with a cache the caller knows how long a request may grow.
        """
        cfg, ax = self.cfg, self._axes(ids_BT, cache)
        common = (cfg, ax, self.dtype)
        B, T = ids_BT.shape
        slots_T = row_slots(ax, T) if cache is None else jnp.arange(T, dtype=jnp.int32)
        first = 0 if cache is None else start
        slots_BT = jnp.broadcast_to(jnp.asarray(first, jnp.int32).reshape(-1, 1) + slots_T[None], (B, T))
        if positions_BT is None or cache is not None:
            positions_BT = slots_BT
        counts_BT = jnp.ones((B, T), bool) if segments_BT is None else segments_BT > 0
        if cache is None and long_B is None and cfg.rope.when == "long":
            last_B = ax.pmax(jnp.where(counts_BT, positions_BT, 0).max(1), CONTEXT)
            long_B = last_B >= jnp.int32(cfg.rope.original_max_position)
        context = self._context(Split.of(cfg, ax, "heads"), positions_BT, slots_BT, segments_BT, long_B, start)
        counts_Bt = Split(ax).inside(counts_BT)

        vocab = vocab_split(cfg, ax)
        table_VD = Embed(*common, name="embed")()
        x_BtD = embed(ids_BT, table_VD, vocab, dtype=self.dtype)
        router = None
        if cfg.moe is not None:
            zero_E = jnp.zeros((cfg.moe.experts,), jnp.float32)
            router = ax.vary(RouterStats(zero_E, zero_E, jnp.zeros((), jnp.float32)), BATCH + ax.tokens)
        hidden, new_cache = [], {}
        for run in cfg.layer_runs(stacked=self.stacked):
            run_cache = None if cache is None else cache[run.name]
            (x_BtD, run_cache, router), outputs = self._run(run, ax)(
                (x_BtD, run_cache, router), context, counts_Bt, self._layer_inputs(run))
            hidden.append(outputs)
            new_cache[run.name] = run_cache
        x_BtD = Norm(*common, name="norm")(x_BtD)
        head = {"table": table_VD} if cfg.tied_head else Head(*common, name="head" if cfg.head == "lm" else cfg.head)()
        return DecoderOutput(x_BtD, head, vocab, new_cache if cache is not None else None,
                             None if router is None else ax.psum(router, ax.tokens),
                             jnp.concatenate(hidden) if self.collect else None)

    def _context(self, split: Split, positions_BT, slots_BT, segments_BT, long_B, start) -> Context:
        """What attention needs of the tokens inside of its `split`; slots and segments of keys are gathered here, once
        for all layers."""
        cos_BTh, sin_BTh = rope_tables(split.inside(positions_BT), self.cfg.rope, self.cfg.head_dim, long_B)
        slots_BT = split.inside(slots_BT)
        context = Context(cos_BTh, sin_BTh, slots_BT, split.of_row(slots_BT), start=start)
        if segments_BT is None:
            return context
        segments_BT = split.inside(segments_BT)
        return context._replace(segments_BT=segments_BT, key_segments_BS=split.of_row(segments_BT))

    def _axes(self, ids_BT, cache) -> Axes:
        """The mesh with what splits a row's tokens: nothing while a cache is filled; else context, which the caller has
        split them over already, and tensor where it divides what is left."""
        if cache is not None:
            return self.ax.splitting(())
        divides = ids_BT.shape[1] % self.ax.size(TENSOR) == 0
        return self.ax.splitting(CONTEXT + TENSOR if divides else CONTEXT)

    def _run(self, run: LayerRun, ax: Axes) -> Callable:
        """One run of blocks as a scan over its stacked parameters."""
        block = Block
        if self.remat not in get_args(Remat):
            raise UserError(f"remat '{self.remat}' is not supported: {', '.join(get_args(Remat))} are")
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT.get(self.remat, ()))
            # Outside a real loop the compiler would merge the recomputation with the first computation.
            block = nn.remat(Block, prevent_cse=run.length == 1, policy=policy)
        in_axes: Any = (nn.broadcast, nn.broadcast, 0)
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=run.length,
                          in_axes=in_axes, metadata_params={nn.PARTITION_NAME: "layers"})
        return scanned(self.cfg, ax, self.dtype, self.train, run.sparse, self.collect, self.expert_exchange,
                       name=run.name)

    def _layer_inputs(self, run: LayerRun):
        windowed = self.cfg.windowed_layers()
        flags_R = jnp.asarray([windowed[i] for i in run.layers]) if any(windowed) else None
        return jnp.arange(run.length, dtype=jnp.int32), flags_R


def init_params(cfg: ModelConfig, key: jax.Array, *, stacked: bool = True, mesh: Mesh | None = None,
                specs: Any = None) -> dict:
    """Fresh float32 parameters: normal(init_std) matrices, zero biases, unit norms; the same bits in both layouts and
    on every mesh, each device making its own pieces: those of `specs`, such as a loss's (default: `param_specs`)."""
    def init(key):      # under jit, so that the forward pass, which declares the parameters, is not computed
        params = nn.meta.unbox(Decoder(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        return params if stacked else unstack(params, cfg)

    if mesh is None:
        return jax.jit(init)(key)
    specs = param_specs(cfg, mesh, stacked=stacked) if specs is None else specs
    return jax.jit(init, out_shardings=shardings(specs, mesh))(key)


def param_specs(cfg: ModelConfig, mesh: Mesh | None, *, stacked: bool = True, quant: Quant = None,
                spread_over: tuple[str, ...] = FSDP) -> dict:
    """The partition spec of each parameter on the mesh, a tree like the parameters (`sharding/rules.py`); with `quant`
    a tree like `ops.quant.quantize` makes. `spread_over` as in `Axes`."""
    rules = Rules.of(cfg, dataclasses.replace(Axes.of(mesh), spread_over=spread_over))
    def spec(leaf: Any) -> P:
        if leaf.names[0] == "layers":
            return P(None, *rules.spec(leaf.names[1:], leaf.value.shape[1:]))
        return rules.spec(leaf.names, leaf.value.shape)

    specs: dict = jax.tree.map(spec, _declared(cfg), is_leaf=lambda x: isinstance(x, nn.Partitioned))
    specs = quantized_specs(specs) if quant else specs
    if stacked:
        return specs
    runs = cfg.layer_runs()
    others = {name: specs[name] for name in specs.keys() - {run.name for run in runs}}
    return others | {f"layers_{i}": specs[run.name] for run in runs for i in run.layers}


@functools.lru_cache(maxsize=8)
def _declared(cfg: ModelConfig) -> dict:
    """Shapes and logical axes of the stacked parameters, read only: kept, because state, step, evaluation and serving
    each ask where they lie. A stack is traced as one layer, which spares seconds at start; a layer lies as it does."""
    return jax.eval_shape(lambda: Decoder(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def abstract_params(cfg: ModelConfig, *, stacked: bool = True, quant: Quant = None) -> dict:
    """`init_params`, with `quant` quantized, as ShapeDtypeStructs: shapes and dtypes, no memory."""
    def init():
        params = init_params(cfg, jax.random.key(0), stacked=stacked)
        return quantize(params) if quant else params

    return jax.eval_shape(init)
