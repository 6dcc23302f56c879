"""What a program sends between devices: its collectives, as its jaxpr writes them.

    ledger(jax.make_jaxpr(step)(*args)) → {Line("all-gather", ("tensor",)): Sum(count=4, bytes=65536), …}

Loops count as often as they run. Nothing is compiled; a test compares with what the compiler makes of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

KINDS = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce",
    "all_gather": "all-gather", "all_gather_invariant": "all-gather", "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all", "ragged_all_to_all": "ragged-all-to-all", "ppermute": "collective-permute",
}
"""Primitive → the name that compilers have for it. What else names an axis sends nothing."""
HLO = re.compile(rf" ({'|'.join(sorted(set(KINDS.values())))})(?:-start)?\(")


class Line(NamedTuple):
    kind: str
    axes: tuple[str, ...]


class Sum(NamedTuple):
    count: int
    bytes: int
    """Of the larger of what goes in and what comes out, on one device."""


class Collective(NamedTuple):
    line: Line
    bytes: int
    times: int
    """How often the loops around it run it."""


def collectives(program: ClosedJaxpr, platform: str = "cpu") -> Iterator[Collective]:
    """Each collective of what `jax.make_jaxpr` returns that its results need, as it is written.

    Of branches by platform, that of `platform` counts; of others, the one that sends the most bytes. A loop of unknown
    length counts once.
    """
    jaxpr = program.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _walk(used, platform, 1)


def ledger(program: ClosedJaxpr, platform: str = "cpu") -> dict[Line, Sum]:
    """The collectives of a program, added up by kind and axes."""
    counts: Counter[Line] = Counter()
    sizes: Counter[Line] = Counter()
    for found in collectives(program, platform):
        counts[found.line] += found.times
        sizes[found.line] += found.times * found.bytes
    return {line: Sum(counts[line], sizes[line]) for line in sorted(counts)}


def difference(more: dict[Line, Sum], less: dict[Line, Sum]) -> dict[Line, Sum]:
    """What the one program sends beyond the other."""
    nothing = Sum(0, 0)
    found = {line: Sum(*(a - b for a, b in zip(more.get(line, nothing), less.get(line, nothing), strict=True)))
             for line in sorted(more.keys() | less.keys())}
    return {line: total for line, total in found.items() if total != nothing}


def compiled_kinds(hlo: str) -> Counter[str]:
    """How often each kind of collective stands in a compiled program's text, loops counted once."""
    return Counter(match[1] for match in map(HLO.search, hlo.splitlines()) if match)


def _walk(jaxpr: Jaxpr, platform: str, times: int) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in KINDS:
            axes = params["axes"] if "axes" in params else params["axis_name"]
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            # A ragged exchange is given the array that it fills.
            given = eqn.invars[:1] if name == "ragged_all_to_all" else eqn.invars
            size = max(sum(map(_bytes, given)), sum(map(_bytes, eqn.outvars)))
            yield Collective(Line(KINDS[name], axes), size, times)
        elif name == "cond":
            yield from _branch(params, platform, times)
        else:
            for inner in _inner(params):
                yield from _walk(inner, platform, times * params["length"] if name == "scan" else times)


def _branch(params: dict[str, Any], platform: str, times: int) -> list[Collective]:
    branches = [list(_walk(branch.jaxpr, platform, times)) for branch in params["branches"]]
    if (platforms := params.get("branches_platforms")) is not None:
        return branches[next(i for i, names in enumerate(platforms) if names is None or platform in names)]
    return max(branches, key=lambda found: sum(c.times * c.bytes for c in found))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _bytes(var: Any) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize
