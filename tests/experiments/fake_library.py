"""A folder like Python's library, of a few small modules."""

from __future__ import annotations

import random
from pathlib import Path

HELD_OUT = {"queue"}
TRAIN = {"alpha", "beta", "gamma", "package"}
WORDS = "count index value name result items key node path text line number first last".split()


def module_text(seed: int, functions: int = 12) -> str:
    """Python-like text; no two seeds share many lines."""
    draw = random.Random(seed)
    parts = [f'"""Module {seed}: {" ".join(draw.choices(WORDS, k=4))}."""\n']
    for i in range(functions):
        first, second, third = draw.sample(WORDS, 3)
        parts.append(f"\ndef {first}_{second}_{seed}_{i}({second}, {third}={draw.randint(0, 999)}):\n"
                     f"    {first} = [{second} for {second} in {third}_{i}_{seed}]\n"
                     f"    if {third} > {draw.randint(0, 999)}:\n        return {first}\n"
                     f"    return {second} + {draw.randint(0, 999)}\n")
    return "".join(parts)


def write_library(root: Path, *, functions: int = 12) -> Path:
    names = [*sorted(HELD_OUT | TRAIN - {"package"}), "package/__init__", "package/core"]
    for seed, name in enumerate(names):
        path = root / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(module_text(seed, functions))
    return root
