"""The device side of generation: the state of all slots, and the compiled programs that change it.

A *slot* is one row of the cache; a request sample lives in one slot from admission to its last token. Letters: R slots
on this device, V vocabulary, T tokens of a prefill chunk, C tokens that one decode call may produce. Every program is
one `per_device` function jitted with its state donated, so the cache is updated in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.cache import cache_spec, empty_cache
from qwen2_jax.model.decoder import Decoder, param_specs
from qwen2_jax.ops.quant import quant_of
from qwen2_jax.ops.sample import Leaf, SamplingSettings, sample
from qwen2_jax.ops.vocab import logits, target_logprobs
from qwen2_jax.shapes import kv_bytes_per_token
from qwen2_jax.sharding.axes import BATCH, IN_STEP, Axes
from qwen2_jax.sharding.compiler import compile_serving
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, TOKENS_SPEC, per_device, shardings
from qwen2_jax.sharding.rules import Rules

DECODE_CHUNK = 32
"""Most tokens a slot produces in one decode call; between calls the host streams text and refills slots."""
STOP_IDS = 4
"""Stop ids that one compiled program checks; fewer are repeated."""


class SlotState(NamedTuple):
    """All slots. Leaves have the slot axis first; in the cache it is second, behind the layers."""

    cache: Leaf
    logits_RV: Leaf
    """Raw logits from which the next token of each slot is drawn."""
    length_R: Leaf
    """Tokens in the cache: the next token goes to this slot of the row."""
    budget_R: Leaf
    """Tokens that may still be drawn; 0 for a slot at rest."""
    seen_RV: Leaf
    """Tokens of prompt and output, for the repetition penalty."""
    key_R: Leaf
    long_R: Leaf
    settings: SamplingSettings | P


STATE_SPEC = SlotState(REPLICATED, *(BATCH_SPEC,) * 7)   # where the cache lies, the model says


class PromptState(NamedTuple):
    """One prompt a device on its way into slots: n rows, one of each device."""

    cache: Leaf
    logits_nV: Leaf
    seen_nV: Leaf
    length_n: Leaf


PROMPT_SPEC = PromptState(REPLICATED, *(BATCH_SPEC,) * 3)


class Admission(NamedTuple):
    """What a slot needs beside its prompt, one entry a device."""

    budget_n: Leaf
    seed_n: Leaf
    number_n: Leaf
    """Of the sample, among those of its request."""
    long_n: Leaf
    settings: SamplingSettings


class Decoded(NamedTuple):
    """What one decode call drew: [R, C]; entries from `count_R` on are meaningless."""

    token_RC: Leaf
    logprob_RC: Leaf
    count_R: Leaf
    stopped_R: Leaf
    """True when the last token drawn was a stop token."""


class Programs:
    """Compiled programs of one model on one mesh, compiled when a shape is first used.

    `notify(what, seconds)` is called after each compilation, not where the persistent cache had the program.
    """

    def __init__(self, params: dict, cfg: ModelConfig, *, dtype: Any, stacked: bool, mesh: Mesh | None,
                 notify: Callable[[str, float], None]):
        self.params, self.cfg, self.dtype, self.stacked, self.mesh = params, cfg, dtype, stacked, mesh
        self.ax = Axes.of(mesh)
        self.devices = self.ax.size(BATCH)
        """Devices, or groups of devices, that have rows of their own."""
        cache = cache_spec(cfg, self.ax)
        self._state_spec, self._prompt_spec = STATE_SPEC._replace(cache=cache), PROMPT_SPEC._replace(cache=cache)
        self._param_specs = param_specs(cfg, mesh, stacked=stacked, quant=quant_of(params))
        self._notify = notify
        self._compiled: dict[tuple, Any] = {}

    def cache_bytes(self, cache_slots: int) -> int:
        """Bytes of one row of the cache on a device."""
        rules = Rules.of(self.cfg, self.ax)
        whole = cache_slots * kv_bytes_per_token(self.cfg, itemsize=jnp.dtype(self.dtype).itemsize)
        return whole * rules.kv_copies // self.ax.size(rules.head_axes)

    def new_state(self, slots: int, cache_slots: int) -> SlotState:
        """State of `slots` slots at rest (a multiple of the devices) that hold `cache_slots` tokens each."""
        def build():
            off_R = jnp.zeros(slots, jnp.float32)
            zero_R = jnp.zeros(slots, jnp.int32)
            return SlotState(
                self._cache(slots, cache_slots), jnp.zeros((slots, self.cfg.vocab), jnp.float32), zero_R, zero_R,
                jnp.zeros((slots, self.cfg.vocab), bool), jax.vmap(sample_key)(zero_R, zero_R),
                jnp.zeros(slots, bool), SamplingSettings(off_R, zero_R, off_R + 1, off_R + 1))

        return self._make(("state", slots, cache_slots), build, self._state_spec)

    def new_prompt(self, cache_slots: int) -> PromptState:
        """Room for one prompt a device."""
        def build():
            n, vocab = self.devices, self.cfg.vocab
            return PromptState(self._cache(n, cache_slots), jnp.zeros((n, vocab), jnp.float32),
                               jnp.zeros((n, vocab), bool), jnp.zeros(n, jnp.int32))

        return self._make(("prompt", cache_slots), build, self._prompt_spec)

    def prefill(self, prompt: PromptState, ids_nT, start_n, count_n, long_n, active_n) -> PromptState:
        """Run one chunk of one prompt a device: `count` real tokens of T, from slot `start` of its row on.

        Arrays have one entry a device; a device whose `active` is false leaves its prompt as it is. A chunk that starts
        at 0 begins a new prompt.
        """
        return self._run("prefill", _prefill, (self._prompt_spec, *(BATCH_SPEC,) * 5), self._prompt_spec, True,
                         prompt, ids_nT, start_n, count_n, long_n, active_n)

    def insert(self, state: SlotState, prompt: PromptState, slot_n, active_n, admission: Admission) -> SlotState:
        """Put each device's prompt into one of its slots and wake the slot."""
        return self._run("insert", _insert, (self._state_spec, self._prompt_spec, *(BATCH_SPEC,) * 3),
                         self._state_spec, True, state, prompt, slot_n, active_n, admission)

    def end(self, state: SlotState, slot_n, active_n) -> SlotState:
        """Put a slot to rest."""
        return self._run("end", _end, (self._state_spec, *(BATCH_SPEC,) * 2), self._state_spec, True,
                         state, slot_n, active_n)

    def decode(self, state: SlotState, stop_ids: Sequence[int], steps: int) -> tuple[SlotState, Decoded]:
        """Draw up to `steps` ≤ DECODE_CHUNK tokens in every live slot; returns early when all are at rest."""
        stop = np.resize(np.asarray(stop_ids or [-1], np.int32), max(STOP_IDS, len(stop_ids)))
        return self._run("decode", _decode, (self._state_spec, REPLICATED, REPLICATED),
                         (self._state_spec, BATCH_SPEC), True, state, stop, jnp.int32(steps))

    def logits(self, ids_BT, long_B):
        """float32 [B, T, V] of whole rows, padding on the right; B a multiple of the devices."""
        return self._run("logits", _logits, (TOKENS_SPEC, BATCH_SPEC), TOKENS_SPEC, False, ids_BT, long_B)

    def scores(self, ids_BT, targets_BT, long_B):
        """(log p of each target, is it the arg-max), each [B, T], of whole rows."""
        return self._run("scores", _scores, (TOKENS_SPEC, TOKENS_SPEC, BATCH_SPEC), TOKENS_SPEC, False,
                         ids_BT, targets_BT, long_B)

    def _cache(self, rows: int, cache_slots: int) -> dict:
        return empty_cache(self.cfg, rows, cache_slots, self.dtype, stacked=self.stacked, ax=self.ax)

    def _make(self, key: tuple, build: Callable, spec):
        """The arrays `build` returns, each made where `spec` wants it; compiled once a key."""
        if key not in self._compiled:
            where = None if self.mesh is None else shardings(spec, self.mesh)
            self._compiled[key] = jax.jit(build, out_shardings=where).lower().compile()
        return self._compiled[key]()

    def _run(self, name: str, fn: Callable, in_specs, out_specs, donate: bool, *args):
        """Call `fn(apply, *local args, ax=)` on every device, compiled for these shapes; `donate` the first of args."""
        leaves = jax.tree.leaves(args)
        key = (name, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            began = time.perf_counter()
            lowered = self._lower(fn, in_specs, out_specs, donate, *args)
            self._compiled[key], was_cached = compile_serving(lowered, self.mesh)
            if not was_cached:
                self._notify(f"{name} {_describe(name, args)}", time.perf_counter() - began)
        return self._compiled[key](self.params, *args)

    def _lower(self, fn: Callable, in_specs, out_specs, donate: bool, *args) -> jax.stages.Lowered:
        def local(params, *local_args, ax: Axes):
            model = Decoder(self.cfg, ax, self.dtype, self.stacked, train=False)
            return fn(partial(model.apply, {"params": params}), *local_args, ax=ax)

        mapped = per_device(local, self.mesh, (self._param_specs, *in_specs), out_specs)
        return jax.jit(mapped, donate_argnums=(1,) if donate else ()).lower(self.params, *args)


def sample_key(seed, number):
    """The key from which a request's sample draws, a token's position still to be folded in. Threefry whatever the
    process's default: the bits of others depend on how many rows draw together."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)


def _describe(name: str, args: tuple) -> str:
    if name in ("logits", "scores", "prefill"):
        ids = args[1] if name == "prefill" else args[0]
        return "of {} x {} tokens".format(*ids.shape)
    return f"for {args[0].length_R.shape[0]} slots"


def _prefill(apply: Callable, prompt: PromptState, ids_1T, start_1, count_1, long_1, active_1, *,
             ax: Axes) -> PromptState:
    start, count = start_1[0], count_1[0]
    out = apply(ids_1T, cache=prompt.cache, start=start, long_B=long_1)
    last_1D = lax.dynamic_slice_in_dim(out.x_BTD[0], count - 1, 1)
    seen_V = jnp.where(start == 0, False, prompt.seen_nV[0])
    real_T = jnp.arange(ids_1T.shape[1]) < count
    # Padding points one past the vocabulary, where the scatter drops it.
    seen_V = seen_V.at[jnp.where(real_T, ids_1T[0], seen_V.shape[0])].set(True, mode="drop")
    new = PromptState(out.cache, logits(last_1D, out.head["table"], out.vocab), seen_V[None], start_1 + count_1)
    return jax.tree.map(lambda new, old: jnp.where(active_1[0], new, old), new, prompt)


def _insert(apply: Callable, state: SlotState, prompt: PromptState, slot_1, active_1, admission: Admission, *,
            ax: Axes) -> SlotState:
    slot, active = slot_1[0], active_1[0]

    def put(leaf, new, axis: int = 0):
        old = lax.dynamic_slice_in_dim(leaf, slot, 1, axis=axis)
        return lax.dynamic_update_slice_in_dim(leaf, jnp.where(active, new, old), slot, axis)

    return SlotState(
        cache=jax.tree.map(partial(put, axis=1), state.cache, prompt.cache),
        logits_RV=put(state.logits_RV, prompt.logits_nV), length_R=put(state.length_R, prompt.length_n),
        budget_R=put(state.budget_R, admission.budget_n), seen_RV=put(state.seen_RV, prompt.seen_nV),
        key_R=put(state.key_R, jax.vmap(sample_key)(admission.seed_n, admission.number_n)),
        long_R=put(state.long_R, admission.long_n),
        settings=jax.tree.map(put, state.settings, admission.settings))


def _end(apply: Callable, state: SlotState, slot_1, active_1, *, ax: Axes) -> SlotState:
    ended_1 = jnp.where(active_1, 0, state.budget_R[slot_1])
    return _rest(state._replace(budget_R=state.budget_R.at[slot_1].set(ended_1)))


def _rest(state: SlotState) -> SlotState:
    """Slots without a budget go back to slot 0 of their row: attention reads as far as the furthest row stands."""
    return state._replace(length_R=jnp.where(state.budget_R > 0, state.length_R, 0))


def _decode(apply: Callable, state: SlotState, stop_ids, steps, *, ax: Axes) -> tuple[SlotState, Decoded]:
    slots, rows = state.length_R.shape[0], jnp.arange(state.length_R.shape[0])
    blank = (jnp.zeros((slots, DECODE_CHUNK), jnp.int32), jnp.zeros((slots, DECODE_CHUNK), jnp.float32),
             jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool))

    def busy(state):
        """Whether a slot is live here or on a device that this one must keep in step with."""
        return ax.psum(jnp.any(state.budget_R > 0).astype(jnp.int32), IN_STEP) > 0

    def unfinished(carry):
        step, going_on, _, _ = carry
        return (step < steps) & going_on

    def advance(carry):
        step, _, state, out = carry
        live_R = state.budget_R > 0
        key_R = jax.vmap(jax.random.fold_in)(state.key_R, state.length_R)
        with jax.named_scope("sample"):
            token_R, logprob_R = sample(state.logits_RV, state.seen_RV, key_R, state.settings)
        stopped_R = live_R & jnp.any(token_R[:, None] == stop_ids[None], axis=-1)
        out = Decoded(out.token_RC.at[:, step].set(token_R), out.logprob_RC.at[:, step].set(logprob_R),
                      out.count_R + live_R.astype(jnp.int32), out.stopped_R | stopped_R)
        state = _rest(state._replace(
            seen_RV=state.seen_RV.at[rows, token_R].max(live_R),
            budget_R=jnp.where(stopped_R, 0, jnp.maximum(state.budget_R - 1, 0))))
        # The last token of the last live slot needs no forward pass.
        going_on = busy(state)
        state = lax.cond(going_on, partial(_forward, apply, token_R=token_R), lambda s: s, state)
        return step + 1, ax.vary(going_on, BATCH), state, out

    start = (jnp.int32(0), busy(state), state, Decoded(*blank))
    _, _, state, out = lax.while_loop(unfinished, advance, ax.vary(start, BATCH))
    return state, out


def _forward(apply: Callable, state: SlotState, *, token_R) -> SlotState:
    """Write the drawn tokens into the cache and get the logits after them; slots at rest stay where they are."""
    live_R = state.budget_R > 0
    out = apply(token_R[:, None], cache=state.cache, start=state.length_R, long_B=state.long_R)
    return state._replace(cache=out.cache, logits_RV=logits(out.x_BTD[:, 0], out.head["table"], out.vocab),
                          length_R=state.length_R + live_R.astype(jnp.int32))


def _logits(apply: Callable, ids_BT, long_B, *, ax: Axes):
    out = apply(ids_BT, long_B=long_B)
    return logits(out.x_BTD, out.head["table"], out.vocab)


def _scores(apply: Callable, ids_BT, targets_BT, long_B, *, ax: Axes):
    out = apply(ids_BT, long_B=long_B)
    logprob_BT, _, greedy_BT = target_logprobs(out.x_BTD, out.head["table"], targets_BT, out.vocab)
    return logprob_BT, greedy_BT
