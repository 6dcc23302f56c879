"""The same model on many meshes of eight host devices, against one device:   python -m tools.sameness

For each mesh: initial parameters (equal to the bit), loss, gradients and parameters of three optimizer steps, greedy
generation and its log-probabilities, in float32. The result is written to docs/sameness.md. `make pod` runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = "--xla_force_host_platform_device_count=8"
if "jax" not in sys.modules and "QWEN2_JAX_PROCESS" not in os.environ:    # read when JAX starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig  # noqa: E402
from qwen2_jax.data.packing import PackedBatch  # noqa: E402
from qwen2_jax.model.decoder import init_params  # noqa: E402
from qwen2_jax.ops.exchange import ExpertExchange  # noqa: E402
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule  # noqa: E402
from qwen2_jax.serve.lm import LM  # noqa: E402
from qwen2_jax.sharding import distributed  # noqa: E402
from qwen2_jax.sharding.mesh import TOKENS_SPEC, make_mesh, place  # noqa: E402
from qwen2_jax.train.losses import NextTokenLoss  # noqa: E402
from qwen2_jax.train.step import init_state, make_step  # noqa: E402

DENSE = ModelConfig(vocab=96, layers=2, d_model=32, d_ff=64, heads=4, kv_heads=2, head_dim=8, tied=True, norm_eps=1e-6,
                    rope=RopeConfig(theta=1e4), max_position=512, init_std=0.2)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(experts=8, top_k=2, d_expert=16, d_shared=32, aux_loss_coef=0.01))
MODELS = {"dense": DENSE, "dense untied": dataclasses.replace(DENSE, tied=False),
          "moe": MOE, "moe untied": dataclasses.replace(MOE, tied=False)}
MESHES = (
    "data=2", "data=8", "fsdp=2", "fsdp=8", "fsdp=2x2", "fsdp=2x2x2", "fsdp=4x2", "expert=2", "expert=8", "context=2",
    "context=8", "tensor=2", "tensor=4", "tensor=8", "data=2,fsdp=2", "data=2,tensor=2", "data=2,context=4",
    "fsdp=2,tensor=4", "fsdp=2x2,tensor=2", "fsdp=4,context=2", "context=2,tensor=4", "context=4,tensor=2",
    "expert=2,tensor=2", "expert=4,fsdp=2", "expert=2,context=2", "data=2,context=2,tensor=2",
    "fsdp=2,expert=2,tensor=2", "fsdp=2,context=2,tensor=2",
)
CASES = tuple((f"{family} untied" if n % 2 == offset else family, mesh)
              for offset, family in enumerate(("dense", "moe")) for n, mesh in enumerate(MESHES))
"""Dense and mixture of experts on every mesh, tied and untied heads taking turns."""
EXCHANGED = ("expert=2", "expert=8", "fsdp=2,expert=2,tensor=2", "expert=2,context=2")
"""Meshes on which a mixture of experts also runs with its tokens exchanged, not gathered."""
ROWS, TOKENS, STEPS, NEW = 8, 32, 3, 12
OPTIM = AdamWConfig(peak=1e-2, steps=10, schedule="constant", eps=1e-3)
"""Adam divides by the gradient's size; with the usual eps, gradients that are zero but for rounding would become steps
of full size, of either sign."""


class Difference(NamedTuple):
    """A mesh against one device: the largest absolute difference of each, beside what it may be."""

    loss: float
    gradient: float
    parameters: float
    logprobs: float
    initial: int
    """Initial parameters that differ in any bit."""
    tokens: int
    """Greedy tokens that differ."""


TOLERANCE = Difference(loss=3e-6, gradient=1e-5, parameters=5e-6, logprobs=1e-5, initial=0, tokens=0)
"""Float32 rounds 6e-8 of a number, and a split sum of a few hundred terms is added up in another order: `loss` in nats
(about 5); `gradient` over the largest entry of its array; `parameters` after three steps of at most 0.01 each."""


class Outcome(NamedTuple):
    initial: Any
    losses: list[float]
    gradient: Any
    parameters: Any
    tokens: list[list[int]]
    logprobs: list[list[float]]


def batch() -> PackedBatch:
    """Rows of two documents and padding, a fifth of the targets not counted."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, DENSE.vocab, (ROWS, TOKENS + 1)).astype(np.int32)
    lengths = (10, 18)
    padding = TOKENS - sum(lengths)
    segments = np.repeat([1, 2, 0], (*lengths, padding))
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(padding)])
    segments, positions = (np.tile(x.astype(np.int32), (ROWS, 1)) for x in (segments, positions))
    weights = ((draw.random((ROWS, TOKENS)) < 0.8) & (segments > 0)).astype(np.float32)
    return PackedBatch(ids[:, :-1], ids[:, 1:], segments, positions, weights)


def outcome(model: ModelConfig, spec: str | None, exchange: ExpertExchange = "auto") -> Outcome:
    """What training and generation give on a mesh; None is one device."""
    mesh = make_mesh(spec)
    loss = NextTokenLoss(model=model, remat="full", expert_exchange=exchange)
    optimizer = optax.chain(keep_gradient(), make_optimizer(OPTIM))
    state = init_state(init_params(model, jax.random.key(0), mesh=mesh), optimizer, mesh, loss.param_specs(mesh))
    initial = whole(state.params)
    step = make_step(loss, optimizer, schedule(OPTIM), mesh=mesh)
    rows, losses, gradient = place(batch(), mesh, TOKENS_SPEC), [], None
    for n in range(STEPS):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
        if n == 0:
            gradient = whole(state.optimizer[0])
    lm = LM(init_params(model, jax.random.key(0), mesh=mesh, stacked=False), model, mesh=mesh, stacked=False)
    prompts = [batch().ids_BT[0, :n].tolist() for n in (3, 32, 17, 9, 24)]
    written = lm.generate(prompts, max_new_tokens=NEW, temperature=0)
    return Outcome(initial, losses, gradient, whole(state.params),
                   [g.token_ids for g in written], [g.logprobs for g in written])


def whole(tree: Any) -> Any:
    """Arrays of all processes' devices as numpy."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.tree.map(
        np.asarray, tree)


def keep_gradient() -> optax.GradientTransformation:
    """Does nothing but remember the gradient."""
    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, updates))


@functools.lru_cache
def on_one_device(model: ModelConfig) -> Outcome:
    return outcome(model, None)


def difference(model: ModelConfig, spec: str, many: Outcome | None = None,
               exchange: ExpertExchange = "auto") -> Difference:
    """A mesh, or the outcome that several processes had on it, against one device."""
    one, many = on_one_device(model), many or outcome(model, spec, exchange)

    def largest(a: Any, b: Any, relative: bool = False) -> float:
        scale = (lambda x: np.abs(x).max()) if relative else (lambda x: 1)
        return max((float(np.abs(x - y).max() / scale(x))
                    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), default=0.0)

    return Difference(
        loss=largest(one.losses, many.losses),
        gradient=largest(one.gradient, many.gradient, relative=True),
        parameters=largest(one.parameters, many.parameters),
        logprobs=largest(one.logprobs, many.logprobs),
        initial=sum(int((x != y).sum()) for x, y in zip(jax.tree.leaves(one.initial), jax.tree.leaves(many.initial),
                                                        strict=True)),
        tokens=sum(x != y for a, b in zip(one.tokens, many.tokens, strict=True) for x, y in zip(a, b, strict=True)))


def beyond(found: Difference) -> list[str]:
    """What lies beyond its tolerance."""
    return [f"{name} {value:.1e}, at most {most:.1e}"
            for name, value, most in zip(Difference._fields, found, TOLERANCE, strict=True) if not value <= most]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mesh", action="append", help="one mesh, and no report (may be repeated)")
    parser.add_argument("--model", action="append", choices=MODELS, help="with --mesh; default: all (may be repeated)")
    parser.add_argument("--save", type=Path, help="with one mesh and one model: keep what several processes find there")
    args = parser.parse_args()
    if args.save:
        distributed.start()
        found = outcome(MODELS[args.model[0]], args.mesh[0])
        if jax.process_index() == 0:
            args.save.write_bytes(pickle.dumps(tuple(found)))
        return
    lines, failed = [], 0
    cases = [(name, spec) for name in args.model or MODELS for spec in args.mesh] if args.mesh else CASES
    chosen = [(*case, False) for case in cases] + [("moe", spec, True) for spec in EXCHANGED if not args.mesh]
    for name, spec, sent in chosen:
        found = difference(MODELS[name], spec, exchange="all_to_all" if sent else "auto")
        failed += bool(beyond(found))
        name += ", exchanged" * sent
        lines.append(f"| {name} | `{spec}` | {found.initial} | {found.loss:.1e} | {found.gradient:.1e} "
                     f"| {found.parameters:.1e} | {found.tokens} | {found.logprobs:.1e} |")
        print(lines[-1], *beyond(found), flush=True)
    if not args.mesh:
        write_report(lines)
    sys.exit(failed and f"{failed} beyond the tolerance")


def write_report(lines: list[str]) -> None:
    most = TOLERANCE
    (Path(__file__).parents[1] / "docs" / "sameness.md").write_text("\n".join([
        "# The same numbers on every mesh",
        "",
        f"Command: `make pod`. Eight host devices against one, float32, JAX {jax.__version__}; tiny models of two",
        f"layers, {ROWS} packed rows of {TOKENS} tokens, full remat. Differences are absolute and the largest found;",
        "the gradient's are over the largest entry of its array. `parameters` are those after three AdamW steps;",
        f"`log-probabilities` those of five greedy continuations of {NEW} tokens. Tolerances: loss {most.loss:.0e},",
        f"gradient {most.gradient:.0e}, parameters {most.parameters:.0e}, log-probabilities {most.logprobs:.0e};",
        "initial parameters and tokens must be equal.",
        "",
        "| model | mesh | initial parameters that differ | loss | gradient | parameters | tokens that differ "
        "| log-probabilities |",
        "|---|---|---|---|---|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    main()
