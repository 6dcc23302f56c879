"""What one block sends between devices, forward and in a training step: every collective, its count and its bytes.

A line that changes is a change of what a pod pays for: change the table with it, and say why. A collective that appears
by itself (a weight gathered twice, a tensor that the compiler had to lay out anew) fails here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest

from qwen2_jax.model.decoder import abstract_params
from qwen2_jax.ops import dot
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, make_mesh, per_device
from qwen2_jax.train.losses import NextTokenLoss
from tools.ledger import collectives, compiled_kinds, difference, ledger
from tools.sameness import MODELS, batch

AG, RS, AR, A2A, HOP = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
X = 8 * 32 * 32 * 4
"""Bytes of all tokens' hidden states [8, 32, 32], float32."""
KV = X // 2
"""Of their keys, or values: 2 heads of 8 where the model is 32 wide."""
ATTENTION, MLP, SHARED, ROUTER = 3 * 32 * 32 * 4, 3 * 64 * 32 * 4, 3 * 32 * 32 * 4, 8 * 32 * 4
"""Of the matrices: queries, keys, values and output; a dense block's three; the shared expert's; the router's."""
EXPERTS = 8 * 3 * 16 * 32 * 4
NORMS, BIASES, GATE = 2 * 32 * 4, (32 + 16 + 16) * 4, 32 * 4
COMMON = ATTENTION + ROUTER + SHARED + GATE
"""Of an expert block's matrices that are no expert's; and the parts that tensor=2 makes of them."""
COMMON_OF_TENSOR = ATTENTION // 2 + ROUTER + SHARED // 2 + GATE
CHOICES = 8 * 32 * 2 * 4
"""Of all tokens' 2 weights, or 2 expert numbers."""

pytestmark = pytest.mark.slow

TABLE = {
    ("dense", "data=2", "auto"): ({}, {
        (AR, "data"): (12, ATTENTION + MLP + NORMS + BIASES),   # each gradient is summed, whole
    }),
    ("dense", "fsdp=2x2", "auto"): ({
        (AG, "fsdp_x fsdp_y"): (7, ATTENTION + MLP),            # each matrix, along both torus dimensions at once
    }, {
        (AG, "fsdp_x fsdp_y"): (14, 2 * (ATTENTION + MLP)),     # again for the backward pass: nothing gathered is kept
        (RS, "fsdp_x"): (7, ATTENTION + MLP),                   # matrices' gradients go back one dimension
        (RS, "fsdp_y"): (7, (ATTENTION + MLP) // 2),            # after the other
        (AR, "fsdp_x fsdp_y"): (5, NORMS + BIASES),             # what is too small to split
    }),
    ("dense", "tensor=2", "auto"): ({
        (AG, "tensor"): (2, 2 * X),                             # tokens into each half
        (RS, "tensor"): (2, 2 * X),                             # and its sums out of it
    }, {
        (AG, "tensor"): (6, 6 * X),                             # in, in again for the backward pass, gradients in
        (RS, "tensor"): (5, 5 * X),                             # out, attention's again, gradients out
        (AR, "tensor"): (2, NORMS),                             # norms see this device's tokens only
    }),
    ("dense", "context=2", "auto"): ({
        (AG, "context"): (2, 2 * KV),                           # keys and values
    }, {
        (AG, "context"): (4, 4 * KV),
        (RS, "context"): (2, 2 * KV),
        (AR, "context"): (12, ATTENTION + MLP + NORMS + BIASES),
    }),
    ("dense", "fsdp=2,context=2,tensor=2", "auto"): ({
        (AG, "fsdp_x"): (7, (ATTENTION + MLP) // 2),            # tensor's half of each matrix
        (AG, "context"): (2, 2 * KV // 4),                      # of half the rows, half the heads
        (AG, "tensor"): (2, 2 * X // 4),                        # of half the rows, half their tokens
        (RS, "tensor"): (2, 2 * X // 4),
    }, {
        (AG, "fsdp_x"): (14, ATTENTION + MLP),
        (AG, "context"): (4, 4 * KV // 4),
        (AG, "tensor"): (6, 6 * X // 4),
        (RS, "fsdp_x"): (7, (ATTENTION + MLP) // 2),
        (RS, "context"): (2, 2 * KV // 4),
        (RS, "tensor"): (5, 5 * X // 4),
        (AR, "context"): (7, (ATTENTION + MLP) // 4),           # the pieces of matrices that a device keeps
        (AR, "fsdp_x context"): (3, BIASES // 2),               # split over tensor, and over nothing else
        (AR, "fsdp_x context tensor"): (2, NORMS),
    }),
    ("moe", "expert=2", "gather"): ({
        (AG, "expert"): (12, X + 2 * CHOICES + COMMON),         # tokens, weights and experts of all; other matrices
        (RS, "expert"): (1, X),                                 # results, summed where the tokens came from
    }, {
        (AG, "expert"): (25, 3 * X + 4 * CHOICES + 2 * COMMON),     # twice, and the results' gradients
        (RS, "expert"): (12, 2 * X + CHOICES + COMMON),         # results, gradients of tokens, weights and matrices
        (AR, "expert"): (5, NORMS + BIASES),
    }),
    ("moe", "expert=2", "all_to_all"): ({
        (AG, "expert"): (10, 2 * 2 * 4 + COMMON),               # how many rows go from where to where; matrices
        (A2A, "expert"): (4, 2 * X + 2 * CHOICES),              # as above, each row where it is wanted; results back
    }, {
        (AG, "expert"): (20, 2 * 2 * 2 * 4 + 2 * COMMON),
        (A2A, "expert"): (10, 5 * X + 5 * CHOICES),             # twice but for results; gradients of all but numbers
        (RS, "expert"): (9, COMMON),
        (AR, "expert"): (5, NORMS + BIASES),
    }),
    ("moe", "fsdp=2,expert=2,tensor=2", "gather"): ({
        (AG, "fsdp_x"): (3, EXPERTS // 4),
        (AG, "fsdp_x expert"): (9, COMMON_OF_TENSOR),           # what is no expert's lies spread over both
        (AG, "tensor"): (4, 2 * X // 4 + 2 * CHOICES // 4),     # into attention; into the experts with their choices
        (AG, "expert"): (3, X // 2 + 2 * CHOICES // 2),
        (RS, "expert"): (1, X // 2),
        (RS, "tensor"): (2, 2 * X // 4),                        # routed and shared experts come out as one sum
    }, {
        (AG, "fsdp_x"): (6, 2 * EXPERTS // 4),
        (AG, "fsdp_x expert"): (18, 2 * COMMON_OF_TENSOR),
        (AG, "tensor"): (10, 6 * X // 4 + 4 * CHOICES // 4),
        (AG, "expert"): (7, 3 * X // 2 + 4 * CHOICES // 2),
        (RS, "fsdp_x"): (12, EXPERTS // 4 + COMMON_OF_TENSOR),
        (RS, "expert"): (12, 2 * X // 2 + CHOICES // 2 + COMMON_OF_TENSOR // 2),
        (RS, "tensor"): (6, 5 * X // 4 + CHOICES // 4),
        (AR, "tensor"): (2, (ROUTER + GATE) // 4),
        (AR, "fsdp_x expert"): (3, BIASES // 2),
        (AR, "fsdp_x expert tensor"): (2, NORMS),
    }),
}


def program(case: tuple[str, str, str], layers: int, gradient: bool, **settings):
    model, spec, exchange = case
    mesh = make_mesh(spec)
    loss = NextTokenLoss(model=dataclasses.replace(MODELS[model], layers=layers), remat="full",
                         expert_exchange=exchange, **settings)
    sums = per_device(loss.sums, mesh, (loss.param_specs(mesh), TOKENS_SPEC), REPLICATED)

    def mean(params, rows):
        return loss.mean(sums(params, rows))

    return jax.grad(mean) if gradient else mean, (abstract_params(loss.model), batch())


def of_one_block(case: tuple[str, str, str], gradient: bool, **settings) -> dict:
    """What three layers send beyond two."""
    totals = []
    for layers in (3, 2):
        fn, args = program(case, layers, gradient, **settings)
        totals.append(ledger(jax.make_jaxpr(fn)(*args)))
    return {(line.kind, " ".join(line.axes)): tuple(total) for line, total in difference(*totals).items()}


@pytest.mark.parametrize("case", TABLE, ids=" ".join)
def test_collectives_of_a_block(case):
    forward, step = TABLE[case]
    assert of_one_block(case, gradient=False) == forward
    assert of_one_block(case, gradient=True) == step


def test_gradients_that_leave_by_hops(monkeypatch):
    """As on TPU: every matrix but keys' and values' in halves that go once to the neighbour, along one torus dimension,
    then along the other. What a hop brings is the half that the device, or its neighbour, goes on with."""
    monkeypatch.setattr(Axes, "on_tpu", True)
    monkeypatch.setattr(dot, "RING_LEAST", 0)
    forward, step = TABLE["dense", "fsdp=2x2", "auto"]
    by_ring, keys_and_values = ATTENTION + MLP - ATTENTION // 3, ATTENTION // 3
    assert of_one_block(("dense", "fsdp=2x2", "auto"), gradient=False) == forward
    assert of_one_block(("dense", "fsdp=2x2", "auto"), gradient=True) == {
        **step,
        (RS, "fsdp_x"): (2, keys_and_values), (RS, "fsdp_y"): (2, keys_and_values // 2),
        (HOP, "fsdp_x"): (5, by_ring // 2), (HOP, "fsdp_y"): (5, by_ring // 4),
    }


def test_sums_in_float32_send_twice_the_bytes():
    """Of gradients alone: weights go on travelling as they are computed with."""
    case = ("dense", "data=2,fsdp=2x2", "auto")
    rounded, exact = (of_one_block(case, gradient=True, dtype="bfloat16", reduce_dtype=name)
                      for name in ("", "float32"))
    assert {kind for kind, _ in rounded} == {AG, RS, AR}
    for line, (count, size) in rounded.items():
        assert exact[line] == (count, size if line[0] == AG else 2 * size)


def test_the_compiler_adds_none():
    fn, args = program(("moe", "fsdp=2,expert=2,tensor=2", "all_to_all"), 2, gradient=True)
    written = Counter(found.line.kind for found in collectives(jax.make_jaxpr(fn)(*args)))
    compiled = compiled_kinds(jax.jit(fn).lower(*args).compile().as_text())
    assert {AG, RS, AR, A2A} <= set(compiled)
    assert {kind: count for kind, count in compiled.items() if count > written[kind]} == {}
