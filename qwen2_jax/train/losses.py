"""Losses as sums: what a batch adds up to, and the one place where it is divided.

`sums` adds over this device's rows and then over devices; `mean` turns the sums of a whole step into the number that is
minimised. So the result does not depend on how a batch is packed, sharded, or split.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from qwen2_jax.config import ModelConfig, Remat
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.model.decoder import Decoder, param_specs
from qwen2_jax.ops.exchange import ExpertExchange
from qwen2_jax.ops.experts import RouterStats, load_balancing_loss
from qwen2_jax.ops.vocab import target_logprobs
from qwen2_jax.sharding.axes import BATCH, CONTEXT, ONE_DEVICE, TRAINED, Axes
from qwen2_jax.sharding.order import balance

jax.tree_util.register_dataclass(PackedBatch)   # here, because `data/` is numpy alone


class LossSums(NamedTuple):
    """Float32 sums over the counted targets of all devices."""

    nll: jax.Array
    """-log p(target), nats."""
    z: jax.Array
    """Squared log-sum-exp of the logits."""
    correct: jax.Array
    """Targets that are the arg-max."""
    count: jax.Array
    """Targets counted."""
    seen: jax.Array
    """Tokens that went in: all but padding."""
    router: RouterStats | None
    """Over layers and all real tokens, whether their targets count or not; None for dense models."""
    of_sources_S2: jax.Array | None = None
    """`nll` and `count` of each source [S, 2]; None where they are not told apart."""


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss:
    """Mean cross-entropy of the next token, plus the router's balancing loss (`model.moe.aux_loss_coef`), plus
    `z_coef` times the mean of log-sum-exp squared (PaLM, section 5).

    `dtype` is what the model computes in; `stacked` must match the parameters. `remat` as in `Decoder`.
    `reduce_dtype` is what weights' gradients are summed in over devices, "" for what is computed in: "float32" sends
    twice the bytes and rounds no sum. `sources`: names of the sources that `sources_BT` numbers, where the metrics are
    to tell them apart.
    """

    model: ModelConfig
    dtype: str = "float32"
    stacked: bool = True
    remat: Remat = "none"
    z_coef: float = 0.0
    expert_exchange: ExpertExchange = "auto"
    reduce_dtype: str = ""
    sources: tuple[str, ...] = ()

    @property
    def gradient_dtype(self) -> Any:
        """What gradients of parameters are summed in over devices, and so all that there is to keep of them."""
        return jnp.dtype(self.reduce_dtype or self.dtype)

    def param_specs(self, mesh: Mesh | None) -> dict:
        """Where the parameters lie on a mesh."""
        return param_specs(self.model, mesh, stacked=self.stacked, spread_over=TRAINED)

    def sums(self, params: dict, batch: PackedBatch, *, ax: Axes = ONE_DEVICE) -> LossSums:
        """Sums over this device's tokens [b, T], then over devices."""
        ax, batch = balance(dataclasses.replace(ax, reduce_dtype=self.reduce_dtype, spread_over=TRAINED), batch)
        decoder = Decoder(self.model, ax, jnp.dtype(self.dtype), self.stacked, remat=self.remat,
                          expert_exchange=self.expert_exchange)
        out: Any = decoder.apply({"params": params}, batch.ids_BT, positions_BT=batch.positions_BT,
                                 segments_BT=batch.segments_BT)
        with jax.named_scope("loss"):
            logprob_BT, lse_BT, correct_BT = target_logprobs(out.x_BTD, out.head["table"], batch.targets_BT,
                                                              out.vocab)
            weight_BT = batch.weights_BT.astype(jnp.float32)
            local = LossSums(nll=-jnp.sum(weight_BT * logprob_BT),
                             z=jnp.sum(weight_BT * jnp.square(lse_BT)),
                             correct=jnp.sum(weight_BT * correct_BT.astype(jnp.float32)),
                             count=jnp.sum(weight_BT),
                             seen=jnp.sum((batch.segments_BT > 0).astype(jnp.float32)), router=None,
                             of_sources_S2=self._of_sources(batch, weight_BT, logprob_BT))
        sums = ax.psum(local, BATCH + CONTEXT)
        return sums._replace(router=None if out.router is None else ax.psum(out.router, BATCH))

    def _of_sources(self, batch: PackedBatch, weight_BT, logprob_BT):
        if not self.sources or batch.sources_BT is None:
            return None
        sums_B2 = jnp.stack([-jnp.sum(weight_BT * lax.stop_gradient(logprob_BT), 1), jnp.sum(weight_BT, 1)], axis=1)
        # A row has one source.
        of_row_BS = jax.nn.one_hot(batch.sources_BT[:, 0], len(self.sources), dtype=jnp.float32)
        return jnp.matmul(of_row_BS.T, sums_B2, precision=lax.Precision.HIGHEST)

    def mean(self, sums: LossSums) -> jax.Array:
        """The number to minimise, nats a token. A batch without targets gives 0."""
        loss = (sums.nll + self.z_coef * sums.z) / jnp.maximum(sums.count, 1)
        if self.model.moe is not None and sums.router is not None:
            loss = loss + self.model.moe.aux_loss_coef * load_balancing_loss(sums.router)
        return loss

    def bends_in(self, batch: PackedBatch) -> LossSums | None:
        """Those of the batch's sums in which `mean` is not linear, the others 0; None when only the model knows them.

        They are what the gradient of `mean` depends on: with them, gradients of parts of the batch simply add up.
        """
        if self.model.moe is not None and self.model.moe.aux_loss_coef:
            return None     # how many tokens each expert gets
        zero = jnp.zeros((), jnp.float32)
        router = None
        if self.model.moe is not None:
            zero_E = jnp.zeros((self.model.moe.experts,), jnp.float32)
            router = RouterStats(zero_E, zero_E, zero)
        count = jnp.sum(batch.weights_BT.astype(jnp.float32))
        apart = self.sources and batch.sources_BT is not None
        return LossSums(nll=zero, z=zero, correct=zero, count=count, seen=zero, router=router,
                        of_sources_S2=jnp.zeros((len(self.sources), 2), jnp.float32) if apart else None)

    def metrics(self, sums: LossSums) -> dict[str, jax.Array]:
        """Means over the step's targets: `nll` (nats), `accuracy`; `targets`, how many; `seen`, how many tokens went
        in; `balance` of a router; `nll/NAME` of each source, NaN where a step has none of it."""
        count = jnp.maximum(sums.count, 1)
        values = {"nll": sums.nll / count, "accuracy": sums.correct / count, "targets": sums.count,
                  "seen": sums.seen}
        if sums.router is not None:
            values["balance"] = load_balancing_loss(sums.router)
        if sums.of_sources_S2 is not None:      # 0 / 0 where the step has none of a source
            values |= {f"nll/{name}": own[0] / own[1] for name, own in
                       zip(self.sources, sums.of_sources_S2, strict=True)}
        return values
