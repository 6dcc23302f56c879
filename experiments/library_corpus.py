"""The Python standard library's own sources as a corpus: real text that every machine with Python already holds."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from qwen2_jax.errors import UserError

NOT_SOURCES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"})
GENERATED = ("_sysconfigdata_",)
"""Module name prefixes written when Python was built: they say how, and differ from machine to machine."""
HELD_OUT_OF_256 = 16
SHINGLE_LINES = 3
MAX_SHARED = 0.5
"""A file is a near-duplicate when more than this share of its line shingles stands in files already kept."""
MIN_BYTES = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents (one file each) by the module they belong to; a module is wholly in `train` or wholly in `held_out`."""

    train: dict[str, list[bytes]]
    held_out: dict[str, list[bytes]]
    duplicates: int
    """Files left out as near-duplicates of another."""

    @property
    def train_documents(self) -> list[bytes]:
        return [document for documents in self.train.values() for document in documents]

    @property
    def held_out_documents(self) -> list[bytes]:
        return [document for documents in self.held_out.values() for document in documents]


def read_library(root: Path | None = None, *, min_bytes: int = MIN_BYTES) -> Corpus:
    """Read, split and clean the sources under `root`, by default this interpreter's standard library.

    Tests, installed packages and build products are left out. A top-level module or package is held out when the
    first byte of the SHA-256 of its name is below HELD_OUT_OF_256, about one in sixteen, so the split depends neither
    on order nor on a seed. Then near-duplicates go: within each side the later file, and between the sides the one to
    train on.

    Raises UserError when there are too few sources, as on systems that ship Python compiled only.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    modules: dict[str, list[bytes]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if NOT_SOURCES.isdisjoint(parts) and not parts[0].startswith(GENERATED):
            text = _read(path)
            if text:
                modules.setdefault(parts[0].removesuffix(".py"), []).append(text)
    found = sum(len(text) for documents in modules.values() for text in documents)
    if found < min_bytes:
        raise UserError(f"{root} holds {found:,} bytes of Python sources, at least {min_bytes:,} are needed: install "
                        "Python's library with its .py files (Debian: libpython3-stdlib), or use another Python")
    seen: set[int] = set()
    held_out = _without_duplicates({name: d for name, d in modules.items() if is_held_out(name)}, seen)
    train = _without_duplicates({name: d for name, d in modules.items() if not is_held_out(name)}, seen)
    kept = sum(map(len, held_out.values())) + sum(map(len, train.values()))
    return Corpus(train, held_out, sum(map(len, modules.values())) - kept)


def is_held_out(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] < HELD_OUT_OF_256


def _read(path: Path) -> bytes | None:
    """The file as UTF-8, or None when it is not, or holds NUL: the tokenizer and the baselines read the same bytes."""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return None if b"\0" in text else text


def _without_duplicates(modules: dict[str, list[bytes]], seen: set[int]) -> dict[str, list[bytes]]:
    """Files most of whose shingles are new, in order; `seen` collects the shingles of what is kept."""
    kept: dict[str, list[bytes]] = {}
    for name, documents in modules.items():
        for document in documents:
            shingles = _shingles(document)
            if len(shingles & seen) <= MAX_SHARED * len(shingles):
                seen |= shingles
                kept.setdefault(name, []).append(document)
    return kept


def _shingles(document: bytes) -> set[int]:
    """Hashes of each SHINGLE_LINES lines in a row, white space at both ends and empty lines ignored."""
    lines = [line for line in map(bytes.strip, document.splitlines()) if line]
    return {hash(tuple(lines[i:i + SHINGLE_LINES])) for i in range(max(1, len(lines) - SHINGLE_LINES + 1))}
