"""Seconds of computing: the compiler's cycles, and bounds for kernels, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from qwen2_jax.plan.chips import CHIPS, KERNEL_EFFICIENCY
from qwen2_jax.plan.costs import UNKNOWN_CYCLES, Costs, UnknownKernel, part, phase, spent
from qwen2_jax.plan.hlo import parse
from tests.plan.texts import MS, cycles, loop, module

V5E = CHIPS["v5e"]


def costs_of(computations: str, entry: str) -> Costs:
    return Costs(parse(module(computations, entry)), V5E)


def fusion(name: str, milliseconds: float, scope: str = "") -> str:
    return (f'  %{name} = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%sum, metadata={{op_name="{scope}"}}, '
            f'{cycles(milliseconds * MS)}')


def none(loop):
    return None


def test_cycles_weigh_as_often_as_they_run():
    computations, entry = loop(fusion("inner", 2).replace("%x", "%l_x"), limit=28)
    found = spent(costs_of(computations, entry + "\n" + fusion("outer", 1)), none)
    assert found.fusions == pytest.approx(57e-3)
    assert (found.kernels, found.unknown) == (0, 0)


def test_what_is_inside_of_a_fusion_is_not_added_to_it():
    inside = f"%part (y: f32[8]) -> f32[8] {{\n  %y = f32[8]{{0}} parameter(0)\n  ROOT %z = f32[8]{{0}} copy(%y), " \
             f"{cycles(5 * MS)}\n}}\n"
    found = spent(costs_of(inside, f"  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%part, {cycles(MS)}"), none)
    assert found.fusions == pytest.approx(1e-3)


def test_copies_that_are_scheduled_count():
    found = spent(costs_of("", f"  %c = f32[8]{{0}} copy(%x), {cycles(MS)}"), none)
    assert found.fusions == pytest.approx(1e-3)


def test_cycles_that_the_compiler_does_not_know():
    found = spent(costs_of("", f"  %c = f32[8]{{0}} copy(%x), {cycles(UNKNOWN_CYCLES)}\n" + fusion("f", 1)), none)
    assert (found.fusions, found.unknown) == (pytest.approx(1e-3), 1)


def test_a_program_that_runs_several_times_a_step():
    assert spent(costs_of("", fusion("f", 1)), none, 3).fusions == pytest.approx(3e-3)


def splash(name: str, results: str, operands: str = "%table, %q, %k, %v") -> str:
    return f"""  %table = s8[1,4,4]{{2,1,0}} parameter(1)
  %q = bf16[2,7,4096,128]{{3,2,1,0}} parameter(2)
  %k = bf16[2,1,4096,128]{{3,2,1,0}} parameter(3)
  %v = bf16[2,1,4096,128]{{3,2,1,0}} parameter(4)
  %kernel.3 = {results} custom-call({operands}), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(step)/attention/{name}/pallas_call"}}"""


SQUARES = 2 * 2 * 7 * 4096 * 4096 * 128 / 2
"""Operations of one causal product of two rows, seven heads, 4096 tokens, width 128."""


@pytest.mark.parametrize(("name", "results", "products"), [
    ("splash_mha_fwd_segmented_residuals", "(bf16[2,7,4096,128], f32[2,7,4096,128])", 2),
    ("splash_mqa_fwd_no_residuals", "bf16[2,7,4096,128]", 2),
    ("splash_mha_dq_segmented_no_residuals", "(f32[2,1024,128], bf16[2,7,4096,128])", 3),
    ("splash_mha_dkv_no_residuals", "(f32[8], f32[8], bf16[2,1,4096,128], bf16[2,1,4096,128])", 4),
    ("splash_mha_dkv_no_residuals", "(bf16[2,7,4096,128], f32[8], f32[8], bf16[2,1,4096,128], bf16[2,1,4096,128])", 5),
])
def test_attention_kernels(name, results, products):
    found = spent(costs_of("", splash(name, results)), none)
    assert found.kernels == pytest.approx(products * SQUARES / (KERNEL_EFFICIENCY * V5E.flops))
    assert found.by_part == {("attention", "forward"): found.kernels}


@pytest.mark.parametrize(("name", "operands", "result"), [
    ("gmm", "bf16[8192,3584] bf16[16,2560,3584]", "bf16[8192,2560]"),
    ("gmm", "bf16[8192,3584] bf16[16,3584,2560]", "bf16[8192,2560]"),
    ("tgmm", "bf16[8192,2560] bf16[8192,3584]", "bf16[16,2560,3584]"),
    ("tgmm", "bf16[2560,8192] bf16[8192,3584]", "bf16[16,2560,3584]"),
])
def test_grouped_products(name, operands, result):
    lhs, rhs = operands.split()
    text = f"""  %table = s32[35]{{0}} parameter(1)
  %lhs = {lhs} parameter(2)
  %rhs = {rhs} parameter(3)
  %{name}.6 = {result} custom-call(%table, %lhs, %rhs), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(step)/layers_0/moe/moe/jit({name})/pallas_call"}}"""
    expected = 2 * 8192 * 3584 * 2560 / (KERNEL_EFFICIENCY * V5E.flops)
    assert spent(costs_of("", text), none).kernels == pytest.approx(expected)


def test_a_kernel_that_only_reads_is_bound_by_bandwidth():
    text = splash("splash_mha_fwd", "bf16[2,7,128,128]").replace("4096", "128")
    moved = 16 + 2 * (2 * 7 + 2 + 2) * 128 * 128 + 2 * 2 * 7 * 128 * 128
    assert spent(costs_of("", text), none).kernels == pytest.approx(moved / V5E.hbm_bandwidth)


def test_a_kernel_without_a_price_is_an_error_that_names_it():
    with pytest.raises(UnknownKernel, match=r"kernel\.3 .*'tpu_custom_call', jit\(step\)/attention/mystery"):
        spent(costs_of("", splash("mystery", "f32[8]")), none)


def test_custom_calls_that_are_no_work():
    found = spent(costs_of("", '  %a = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"'), none)
    assert (found.fusions, found.kernels) == (0, 0)


@pytest.mark.parametrize(("scope", "where", "when"), [
    ("jit(step)/jvp()/shard_map/Decoder/while/body/closed_call/layers_0/attention/attn/dot_general",
     "attention", "forward"),
    ("jit(step)/transpose(jvp())/shard_map/Decoder/while/body/checkpoint/layers_0/mlp/mlp/mul", "mlp", "backward"),
    ("jit(step)/transpose(jvp())/Decoder/while/body/checkpoint/rematted_computation/layers_0/moe/moe/mul",
     "moe", "recomputed"),
    ("jit(step)/optimizer/mul", "optimizer", "update"),
    ("jit(step)/jvp()/shard_map/loss/while/body/exp", "loss", "forward"),
    ("jit(step)/jvp()/Decoder/embed/all_gather", "embed", "forward"),
    ("", "other", "forward"),
])
def test_where_work_belongs(scope, where, when):
    assert (part(scope), phase(scope)) == (where, when)
