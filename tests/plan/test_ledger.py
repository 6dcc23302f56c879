"""What a compiled program moves, on handmade texts: kinds, axes, bytes, what counts once, what is covered."""

from __future__ import annotations

import pytest

from qwen2_jax.plan.chips import CHIPS
from tests.plan.texts import MS, cycles, ledger, loop, module

ROWS = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"      # along y
COLUMNS = "replica_groups=[4,4]<=[4,4]T(1,0)"                               # along x
LINK = CHIPS["v5e"].link_bandwidth
SIZE = 4 * 45_000_000
"""Bytes of a gathered buffer that takes three milliseconds over a line of four: (n-1)/n of it at 45 GB/s."""
SHARD = f"bf16[{SIZE // 8}]{{0}}"
WHOLE = f"bf16[{SIZE // 2}]{{0}}"
START = f"  %shard = {SHARD} parameter(1)\n  %whole = {WHOLE} parameter(2)\n"


def one(text: str, **mesh):
    (found,) = ledger(text, **mesh)
    return found


def work(name: str, milliseconds: float) -> str:
    return f"  %{name} = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%sum, {cycles(milliseconds * MS)}\n"


def test_a_gather_that_waits():
    found = one(module("", f"{START}  %g = {WHOLE} all-gather(%shard), {ROWS}, dimensions={{0}}"))
    assert (found.kind, found.axes, found.mesh_axes, found.count) == ("all-gather", ("y",), ("fsdp_y",), 1)
    assert (found.bytes, found.wire_bytes) == (SIZE, SIZE * 3 // 4)
    assert found.seconds == found.exposed_seconds == pytest.approx(3e-3)


@pytest.mark.parametrize(("instruction", "kind", "size", "wire"), [
    (f"{WHOLE} all-gather(%shard), {ROWS}, dimensions={{0}}", "all-gather", SIZE, 3 / 4),
    (f"{SHARD} reduce-scatter(%whole), {COLUMNS}, dimensions={{0}}, to_apply=%sum", "reduce-scatter", SIZE, 3 / 4),
    (f"{WHOLE} all-reduce(%whole), {COLUMNS}, to_apply=%sum", "all-reduce", SIZE, 3 / 2),
    (f"{WHOLE} all-to-all(%whole), {ROWS}, dimensions={{0}}", "all-to-all", SIZE, 3 / 4),
    (f"{WHOLE} collective-permute(%whole), source_target_pairs={{{{0,1}},{{1,0}}}}", "collective-permute", SIZE, 1),
    (f"({SHARD}, {WHOLE}) all-reduce(%shard, %whole), {ROWS}, to_apply=%sum", "all-reduce", SIZE * 5 / 4, 3 / 2),
])
def test_bytes_of_each_kind(instruction, kind, size, wire):
    found = one(module("", f"{START}  %c = {instruction}"))
    assert (found.kind, found.bytes, found.wire_bytes) == (kind, size, size * wire)


def test_what_is_in_a_loop_counts_each_turn():
    computations, entry = loop(f"  %shard = {SHARD} parameter(1)\n  %g = {WHOLE} all-gather(%shard), {ROWS}", limit=28)
    found = one(module(computations, entry))
    assert (found.count, found.bytes) == (28, 28 * SIZE)
    assert found.exposed_seconds == pytest.approx(28 * 3e-3)


def test_groups_of_one_move_nothing():
    assert ledger(module("", f"{START}  %c = {WHOLE} all-reduce(%whole), replica_groups=[16,1]<=[16]")) == []


def test_several_mesh_axes():
    found = one(module("", f"{START}  %c = {WHOLE} all-reduce(%whole), replica_groups=mesh['axis_0'=16] {{'axis_0'}}"))
    assert (found.axes, found.mesh_axes) == (("x", "y"), ("fsdp_x", "fsdp_y"))
    assert found.seconds == pytest.approx(2 * SIZE * 15 / 16 / (2 * LINK)), "links of both dimensions at once"


def test_groups_with_an_order_of_devices():
    """As the compiler writes them for a mesh that goes round a tray: a comma stands outside of the brackets."""
    order = "mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0'}"
    instruction = f"{WHOLE} all-reduce(%whole), channel_id=5, replica_groups={order}, to_apply=%sum"
    found = one(module("", f"{START}  %c = {instruction}"))
    assert found.mesh_axes == ("fsdp_y",)


def test_one_mesh_axis_over_two_dimensions():
    found = one(module("", f"{START}  %c = {WHOLE} all-reduce(%whole)"), shape={"data": 16})
    assert (found.axes, found.mesh_axes) == (("x", "y"), ("data",))


def test_a_ring_is_twice_as_fast_as_a_line():
    text = module("", f"{START}  %g = {WHOLE} all-gather(%shard), replica_groups=[1,16]<=[16], dimensions={{0}}")
    line = one(text.replace("[1,16]<=[16]", "[16,4]<=[64]"), dimensions=(16, 4))
    ring = one(text.replace("[1,16]<=[16]", "[16,16]<=[16,16]"), dimensions=(16, 16))
    size = SIZE // 4
    assert line.seconds == pytest.approx(4 * size * 3 / 4 / LINK)
    assert ring.seconds == pytest.approx(16 * size * 15 / 16 / (2 * LINK))


def test_every_other_chip_shares_its_links():
    text = module("", f"{START}  %c = {WHOLE} all-reduce(%whole), replica_groups=GROUPS")
    near = one(text.replace("GROUPS", "{{0,1},{2,3}}"))
    far = one(text.replace("GROUPS", "{{0,2},{1,3}}"))
    assert far.seconds == pytest.approx(2 * near.seconds)


def test_a_diagonal_goes_round_corners():
    """Two links each way, one after the other, and each of them is another diagonal's as well."""
    text = module("", f"{START}  %c = {WHOLE} all-reduce(%whole), replica_groups=GROUPS")
    straight = one(text.replace("GROUPS", "{{0,1},{4,5}}"))
    diagonal = one(text.replace("GROUPS", "{{0,5},{1,4}}"))
    assert (diagonal.axes, diagonal.seconds) == (("x", "y"), pytest.approx(straight.seconds))


@pytest.mark.parametrize(("pairs", "shared"), [
    ("{0,1},{3,0}", 1),                 # three links back along a line, each of which carries this alone
    ("{0,1},{1,2},{2,3},{3,0}", 1),
    ("{0,2},{1,3},{2,0},{3,1}", 2),     # the link in the middle carries two each way
    ("{0,5},{1,4}", 1),                 # round corners: along x, then along y
    ("{0,6},{4,2}", 1),
    ("{0,6},{1,7}", 2),
])
def test_a_permute_takes_as_long_as_the_fullest_link(pairs, shared):
    text = module("", f"{START}  %c = {WHOLE} collective-permute(%whole), source_target_pairs={{{pairs}}}")
    assert one(text).seconds == pytest.approx(shared * SIZE / LINK)


def test_a_permute_on_a_ring_takes_the_short_way():
    """Twelve of sixteen chips ahead are four back."""
    text = module("", f"{START}  %c = {WHOLE} collective-permute(%whole), source_target_pairs={{{{0,192}}}}")
    assert one(text, dimensions=(16, 16)).seconds == pytest.approx(SIZE / LINK)


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    found = one(module(f"""
%all-reduce-scatter.1 (input: {WHOLE}) -> {SHARD} {{
  %input = {WHOLE} parameter(0)
  %ar = {WHOLE} all-reduce(%input), channel_id=4, {ROWS}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %ds = {SHARD} dynamic-slice(%ar, %zero), dynamic_slice_sizes={{{SIZE // 8}}}
}}
""", f"{START}  %f = {SHARD} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1"))
    assert (found.kind, found.count, found.bytes) == ("reduce-scatter", 1, SIZE)
    assert found.exposed_seconds == pytest.approx(3e-3)


PAIR = f"""{START}  %s = ({SHARD}, {WHOLE}) all-gather-start(%shard), {ROWS}, dimensions={{0}}
MEANWHILE  %d = {WHOLE} all-gather-done(%s)
"""


@pytest.mark.parametrize(("milliseconds", "exposed"), [(0, 3), (1, 2), (2.5, 0.5), (3, 0), (9, 0)])
def test_what_runs_between_start_and_end_covers(milliseconds, exposed):
    text = PAIR.replace("MEANWHILE", work("between", milliseconds))
    found = one(module("", work("before", 5) + text + work("after", 5)))
    assert (found.count, found.bytes) == (1, SIZE)
    assert found.exposed_seconds == pytest.approx(exposed * 1e-3)


def test_a_loop_in_between_covers_with_all_its_turns():
    computations, inside = loop(work("turn", 0.5).replace("%x", "%l_x"), limit=4)
    found = one(module(computations, PAIR.replace("MEANWHILE", inside + "\n")))
    assert found.exposed_seconds == pytest.approx(1e-3)


def test_two_gathers_over_one_link_are_not_covered_twice():
    text = f"""{START}  %s1 = ({SHARD}, {WHOLE}) all-gather-start(%shard), {ROWS}
  %s2 = ({SHARD}, {WHOLE}) all-gather-start(%shard), GROUPS
{work("between", 4)}  %d1 = {WHOLE} all-gather-done(%s1)
  %d2 = {WHOLE} all-gather-done(%s2)"""
    same = ledger(module("", text.replace("GROUPS", ROWS)))
    other = ledger(module("", text.replace("GROUPS", COLUMNS)))
    assert sum(row.exposed_seconds for row in same) == pytest.approx(2e-3)
    assert sum(row.exposed_seconds for row in other) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["async", "call"])
def test_a_collective_in_a_computation_that_runs_beside(kind):
    found = one(module(f"""
%wrapped (w: {SHARD}) -> {WHOLE} {{
  %w = {SHARD} parameter(0)
  ROOT %g = {WHOLE} all-gather(%w), {ROWS}, dimensions={{0}}
}}
""", f"""{START}  %s = (({SHARD}), {WHOLE}, u32[]) {kind}-start(%shard), calls=%wrapped
  %u = (({SHARD}), {WHOLE}, u32[]) {kind}-update(%s)
{work("between", 1)}  %d = {WHOLE} {kind}-done(%u)"""))
    assert (found.count, found.bytes) == (1, SIZE)
    assert found.exposed_seconds == pytest.approx(2e-3)


def fused(name: str, ending: str) -> str:
    """A computation that holds the gather of channel 19, as its start, a step or its end does."""
    return f"""
%{name} (p: {SHARD}) -> {WHOLE} {{
  %p = {SHARD} parameter(0)
  %{name}_g = {WHOLE} all-gather(%p), channel_id=19, {ROWS}, frontend_attributes={{chain_id="7"}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %{name}_r = {WHOLE} {ending}
}}
"""


FUSED = (fused("starts", 'custom-call(%starts_g), custom_call_target="AsyncCollectiveStart"')
         + fused("async_collective_fusion.1", "copy(%async_collective_fusion.1_g)")
         + fused("ends", 'custom-call(%ends_g), custom_call_target="AsyncCollectiveDone"'))
STEP = f"  %step = {WHOLE} fusion(%shard), kind=kOutput, calls=%async_collective_fusion.1, {cycles(MS)}\n"


def chain(middle: str) -> str:
    return f"""{START}  %begin = {WHOLE} fusion(%shard), kind=kCustom, calls=%starts
{middle}  %end = {WHOLE} fusion(%shard), kind=kCustom, calls=%ends
"""


def test_a_fused_collective_counts_once_and_is_covered_by_its_own_fusions():
    found = one(module(FUSED, chain(STEP + work("stranger", 5) + STEP.replace("%step", "%step2"))))
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, SIZE)
    assert found.exposed_seconds == pytest.approx(1e-3), "two steps of a millisecond; what else runs carries nothing on"


def test_a_fused_collective_carried_on_in_an_inner_loop():
    computations, inside = loop(STEP.replace("%shard", "%l_x"), limit=3)
    found = one(module(FUSED + computations, chain(inside + "\n")))
    assert found.count == 1
    assert found.exposed_seconds == pytest.approx(0)
