"""Small compiled programs, written by hand in the form in which XLA prints them."""

from __future__ import annotations

from types import SimpleNamespace

from qwen2_jax.plan.chips import CHIPS
from qwen2_jax.plan.costs import Costs
from qwen2_jax.plan.hlo import parse
from qwen2_jax.plan.ledger import Collective, Ledger
from qwen2_jax.plan.links import Torus

MS = 1.5e6
"""Cycles of a millisecond on v5e."""


def cycles(count: float) -> str:
    """The attribute in which libtpu writes its estimate."""
    return f'backend_config={{"window_config":{{"estimated_cycles":"{int(count)}"}},"flag_configs":[]}}'


def loop(body: str, *, start: int = 0, limit: int = 28, step: int = 1, name: str = "l") -> tuple[str, str]:
    """(computations, the instruction of the entry) of a loop that counts, with `body` run each turn."""
    computations = f"""
%{name}_body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p.1 = (s32[], f32[8]) parameter(0)
  %{name}_i = s32[] get-tuple-element(%p.1), index=0
  %{name}_one = s32[] constant({step})
  %{name}_next = s32[] add(%{name}_i, %{name}_one)
  %{name}_x = f32[8]{{0}} get-tuple-element(%p.1), index=1
{body}
  ROOT %{name}_out = (s32[], f32[8]) tuple(%{name}_next, %{name}_x)
}}

%{name}_condition (p.2: (s32[], f32[8])) -> pred[] {{
  %p.2 = (s32[], f32[8]) parameter(0)
  %{name}_j = s32[] get-tuple-element(%p.2), index=0
  %{name}_limit = s32[] constant({limit})
  ROOT %{name}_lt = pred[] compare(%{name}_j, %{name}_limit), direction=LT
}}
"""
    instructions = f"""
  %{name}_zero = s32[] constant({start})
  %{name}_init = (s32[], f32[8]) tuple(%{name}_zero, %x)
  %{name} = (s32[], f32[8]) while(%{name}_init), condition=%{name}_condition, body=%{name}_body, \
metadata={{op_name="jit(step)/loss/while"}}"""
    return computations, instructions


def module(computations: str, entry: str) -> str:
    return f"""HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
{computations}
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
{entry}
  ROOT %out = f32[8]{{0}} copy(%x)
}}
"""


def ledger(text: str, *, shape: dict[str, int] | None = None, dimensions=(4, 4)) -> list[Collective]:
    """Of a program for a v5e slice of those dimensions, on a mesh with one axis a dimension."""
    shape = shape or {"fsdp_x": dimensions[0], "fsdp_y": dimensions[1]}
    devices = [SimpleNamespace(id=i, coords=(i // dimensions[1], i % dimensions[1], 0), core_on_chip=0)
               for i in range(dimensions[0] * dimensions[1])]
    program, chip = parse(text), CHIPS["v5e"]
    torus = Torus.of(chip, devices, devices)
    return Ledger(program, Costs(program, chip), torus, shape, lambda loop: None).collectives()
