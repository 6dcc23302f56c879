"""The grammar of compiled programs, and how often what is in them runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.plan.hlo import HloError, parse
from tests.plan.texts import loop, module


def times(text: str, assumed=lambda loop: None) -> dict[str, float]:
    return {run.instruction.name: run.times for run in parse(text).runs(assumed)}


def test_an_instruction_in_its_parts():
    text = module("", '  %ag.1 = (bf16[1,8]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]) all-gather(%x, /*index=1*/%y), '
                      'channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={1}, '
                      'metadata={op_name="jit(f)/mlp/a b"}, backend_config={"a":{"b":"7"}}')
    found = parse(text).computations["main"]["ag.1"]
    assert (found.opcode, found.operands, found.root) == ("all-gather", ("x", "y"), False)
    assert found.arrays == [("bf16", (1, 8)), ("f32", ())] and found.bytes == 20
    assert (found.attribute("channel_id"), found.attribute("dimensions")) == ("3", "{1}")
    assert found.attribute("replica_groups") == "{{0,1},{2,3}}" and found.attribute("id") == ""
    assert found.scope == "jit(f)/mlp/a b" and found.backend == {"a": {"b": "7"}}


def test_an_instruction_over_several_lines():
    """As kernels' metadata are printed, with a brace at the beginning of a line."""
    text = module("", '  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
                      'frontend_attributes={m={\n'
                      '"block":"{1}"\n}}, metadata={op_name="jit(f)/splash"}\n  %after = f32[8]{0} copy(%k)')
    main = parse(text).computations["main"]
    assert main["k"].scope == "jit(f)/splash"
    assert list(main) == ["x", "k", "after", "out"] and main["out"].root


def test_a_computation_for_another_core():
    """Its end says which, and it must not swallow the next."""
    text = module("""
%beside (b: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} parameter(0)
}, execution_thread="sparsecore"

%behind (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}
""", "")
    found = parse(text).computations
    assert list(found["beside"]) == ["b"] and list(found["behind"]) == ["c"] and "main" in found


@pytest.mark.parametrize("text", ["", "no program", "HloModule m\n\n%f (x: f32[]) -> f32[] {\n}\n"])
def test_text_without_an_entry_is_refused(text):
    with pytest.raises(HloError, match="entry"):
        parse(text)


@given(st.integers(-5, 5), st.integers(-5, 40), st.integers(1, 7))
def test_a_loop_turns_as_often_as_it_counts(start, limit, step):
    computations, entry = loop("  %work = f32[8]{0} copy(%l_x)", start=start, limit=limit, step=step)
    assert times(module(computations, entry))["work"] == len(range(start, limit, step))


def test_a_loop_that_counts_down():
    computations, entry = loop("  %work = f32[8]{0} copy(%l_x)", start=9, limit=0, step=2)
    computations = computations.replace("add(%l_i", "subtract(%l_i").replace("direction=LT", "direction=GT")
    assert times(module(computations, entry))["work"] == len(range(9, 0, -2))


def test_another_element_of_the_loop_is_no_counter():
    other = "  %other = s32[] get-tuple-element(%p.1), index=1"
    computations, entry = loop(f"{other}\n  %work = f32[8]{{0}} copy(%l_x)")
    with pytest.raises(HloError):
        times(module(computations.replace("add(%l_i", "add(%other"), entry))


def test_loops_in_loops_multiply():
    inner, inside = loop("  %deep = f32[8]{0} copy(%inner_x)", limit=8, step=2, name="inner")
    outer, entry = loop(inside.replace("%x", "%outer_x"), limit=3, name="outer")
    found = times(module(inner + outer, entry))
    assert (found["outer_next"], found["deep"], found["out"]) == (3, 12, 1)


def test_a_condition_and_a_step_inside_of_fusions():
    """With the bound handed in, the counter on the right, and copies in between."""
    text = module("""
%less (p.3: s32[], p.4: s32[]) -> pred[] {
  %p.3 = s32[] parameter(0)
  %p.4 = s32[] parameter(1)
  ROOT %gt = pred[] compare(%p.3, %p.4), direction=GT
}

%plus (p.5: s32[]) -> s32[] {
  %p.5 = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %plus_two = s32[] add(%p.5, %two)
}

%body (p.6: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.6 = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p.6), index=0
  %i_copy = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[] fusion(%i_copy), kind=kLoop, calls=%plus
  %x.1 = f32[8]{0} get-tuple-element(%p.6), index=1
  %work = f32[8]{0} copy(%x.1)
  ROOT %t = (s32[], f32[8]) tuple(%next, %work)
}

%condition (p.7: (s32[], f32[8])) -> pred[] {
  %p.7 = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%p.7), index=0
  %limit = s32[] constant(9)
  ROOT %compared = pred[] fusion(%limit, %j), kind=kLoop, calls=%less
}
""", """  %zero = s32[] constant(0)
  %init = (s32[], f32[8]) tuple(%zero, %x)
  %w = (s32[], f32[8]) while(%init), condition=%condition, body=%body""")
    assert times(text)["work"] == 5


def test_xlas_own_count_goes_first():
    computations, entry = loop("  %work = f32[8]{0} copy(%l_x)", limit=28)
    entry = entry.replace("body=%l_body", 'body=%l_body, backend_config={"known_trip_count":{"n":"5"}}')
    assert times(module(computations, entry))["work"] == 5


def test_a_bound_that_is_computed_is_asked_for():
    computations, entry = loop("  %work = f32[8]{0} copy(%l_x)")
    computations = computations.replace("s32[] constant(28)", "s32[] get-tuple-element(%p.2), index=0")
    text = module(computations, entry)
    with pytest.raises(HloError, match="loop l "):
        times(text)
    assert times(text, lambda loop: 7.0 if "loss" in loop.scope else None)["work"] == 7


def test_a_counter_that_does_not_count_is_not_guessed():
    computations, entry = loop("  %work = f32[8]{0} copy(%l_x)")
    text = module(computations.replace("add(%l_i, %l_one)", "multiply(%l_i, %l_one)"), entry)
    with pytest.raises(HloError):
        times(text)


def test_both_branches_and_calls_count():
    text = module("""
%yes (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %a1 = f32[8]{0} copy(%y)
}

%no (n: f32[8]) -> f32[8] {
  %n = f32[8]{0} parameter(0)
  ROOT %b1 = f32[8]{0} copy(%n)
}
""", """  %c = pred[] constant(true)
  %either = f32[8]{0} conditional(%c, %x, %x), true_computation=%yes, false_computation=%no
  %both = f32[8]{0} conditional(%c, %x, %x), branch_computations={%yes, %no}
  %called = f32[8]{0} call(%x), to_apply=%yes
  %inside = f32[8]{0} fusion(%x), kind=kLoop, calls=%no""")
    found = [run.instruction.name for run in parse(text).runs()]
    assert (found.count("a1"), found.count("b1")) == (3, 2), "what is inside of a fusion is not scheduled"
