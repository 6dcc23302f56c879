"""Does the tree keep the order that docs/architecture.md states?   python -m tools.layers

Reads source by `ast` and imports nothing, so imports inside functions count too. The order itself is read from the
document, which therefore cannot drift from what is enforced.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "qwen2_jax"
MOST_LINES = 400
NAMELESS = {"utils.py", "common.py", "helpers.py", "misc.py"}   # names that say nothing about what is inside
FACE = {"load": "serve"}    # what `from qwen2_jax import …` reaches through the package's lazy attributes
ORACLES = {"torch", "transformers"}
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_gather_invariant", "psum_scatter", "all_to_all",
               "ragged_all_to_all", "ppermute", "pshuffle", "pbroadcast", "pcast", "pvary", "axis_index", "axis_size"}
COLLECTIVES_AT = f"{PACKAGE}/sharding/axes.py"
SHARD_MAP_AT = f"{PACKAGE}/sharding/mesh.py"


def violations(root: Path) -> list[str]:
    """One line for each place under `root` that breaks the architecture, empty when none does."""
    order = room_order((root / "docs" / "architecture.md").read_text(encoding="utf-8"))
    found = []
    for path in python_files(root):
        where = path.relative_to(root).as_posix()
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > MOST_LINES:
            found.append(f"{where}: {lines} lines, at most {MOST_LINES}")
        if path.name in NAMELESS:
            found.append(f"{where}: name the file after its one idea")
        room = room_of(where, order)
        if room is not None:
            found += [f"{where}:{line}: {what}" for line, what in _check(ast.parse(source), where, room, order)]
    return found


def room_order(document: str) -> dict[str, int]:
    """Room → how far right it stands, from the line of arrows in docs/architecture.md."""
    line = next(line for line in document.splitlines() if line.startswith("config →"))
    return {room: rank for rank, group in enumerate(line.split("→")) for room in re.findall(r"\w+", group)}


def python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder.startswith(".") or folder in ("build", "dist", "runs") for folder in folders):
            yield path


def room_of(where: str, order: dict[str, int]) -> str | None:
    """The room of a file's path; None where no order is kept (tests)."""
    parts = where.split("/")
    if parts[0] != PACKAGE:
        return parts[0] if parts[0] in order else None
    if where == f"{PACKAGE}/__init__.py":
        return "cli"            # the face: reaches `serve`, like the command line
    if where == f"{PACKAGE}/__main__.py":
        return "cli"
    return parts[1] if len(parts) > 2 else "config"


def _check(tree: ast.Module, where: str, room: str, order: dict[str, int]) -> Iterator[tuple[int, str]]:
    if room not in order:
        yield 1, f"docs/architecture.md knows no room '{room}'"
        return
    for line, module in imported(tree, where):
        top, _, rest = module.partition(".")
        if top == PACKAGE or top in order:
            yield from ((line, what) for what in _check_direction(room, _target(top, rest, order), order))
        elif room == "config" and top not in sys.stdlib_module_names:
            yield line, f"imports {top}; the top level of the package is standard library only"
        elif where.startswith(PACKAGE):
            if top == "flax" and room != "model":
                yield line, "imports flax, which lives in model/ only"
            if top in ORACLES:
                yield line, f"imports {top}, which is for tests only"
        if module.endswith("shard_map") and where != SHARD_MAP_AT:
            yield line, f"imports shard_map, which lives in {SHARD_MAP_AT}"
        if module.startswith("jax.lax.") and module.rpartition(".")[2] in COLLECTIVES and where != COLLECTIVES_AT:
            yield line, f"imports the collective {module}; only {COLLECTIVES_AT} may"
    lax = {"jax.lax", *lax_names(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr == "shard_map" and where != SHARD_MAP_AT:
            yield node.lineno, f"uses shard_map, which lives in {SHARD_MAP_AT}"
        if node.attr in COLLECTIVES and ast.unparse(node.value) in lax and where != COLLECTIVES_AT:
            yield node.lineno, f"uses lax.{node.attr}; only {COLLECTIVES_AT} may"


def _target(top: str, rest: str, order: dict[str, int]) -> str:
    """The room that an import of `top.rest` reaches."""
    if top != PACKAGE:
        return top
    name = rest.partition(".")[0]
    return name if name in order else FACE.get(name, "config")


def _check_direction(room: str, target: str, order: dict[str, int]) -> Iterator[str]:
    if target == room:
        return
    if order[target] > order[room]:
        yield f"{room} imports {target}, which stands to its right"
    elif order[target] == order[room]:
        yield f"{room} imports {target}; rooms side by side do not see each other"


def imported(tree: ast.Module, where: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions, relative, or by `importlib` with a literal name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join([*where.split("/")[:-1][: None if level == 1 else 1 - level]] if level else [])
                prefix = ".".join(part for part in (base, module) if part)
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                          args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name


def lax_names(tree: ast.Module) -> Iterator[str]:
    """The names under which a file imports `jax.lax`."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="jax", names=names):
                yield from (alias.asname or alias.name for alias in names if alias.name == "lax")
            case ast.Import(names=names):
                yield from (alias.asname for alias in names if alias.name == "jax.lax" and alias.asname)


if __name__ == "__main__":
    found = violations(Path(__file__).resolve().parents[1])
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
