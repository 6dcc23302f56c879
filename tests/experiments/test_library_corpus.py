from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from experiments import library_corpus
from experiments.library_corpus import is_held_out, read_library
from qwen2_jax.errors import UserError
from tests.experiments.fake_library import HELD_OUT, TRAIN, module_text, write_library


def test_whole_modules_are_held_out(tmp_path):
    corpus = read_library(write_library(tmp_path), min_bytes=1)
    assert set(corpus.held_out) == HELD_OUT and set(corpus.train) == TRAIN
    assert len(corpus.held_out["queue"]) == 1 and len(corpus.train["package"]) == 2


def test_the_split_is_a_fact_about_the_name():
    """Known answers: another hash, threshold or byte would move modules between the sides."""
    names = ["queue", "json", "logging", "os", "asyncio", "email", "typing"]
    assert [name for name in names if is_held_out(name)] == ["queue", "json", "logging"]


LEFT_OUT = ["test/test_os.py", "package/tests/test_a.py", "idlelib/idle_test/a.py", "site-packages/numpy/core.py",
            "lib-dynload/x.py", "package/__pycache__/a.py", "_sysconfigdata__linux.py"]


def test_tests_packages_and_build_products_are_left_out(tmp_path):
    for number, name in enumerate(LEFT_OUT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module_text(100 + number))
    corpus = read_library(write_library(tmp_path), min_bytes=1)
    assert set(corpus.held_out) | set(corpus.train) == HELD_OUT | TRAIN
    assert sum(map(len, corpus.train.values())) == len(TRAIN) + 1


@pytest.mark.parametrize("copy, original", [("zebra", "alpha"), ("zebra", "queue"), ("json", "queue")])
def test_near_duplicates_are_left_out(tmp_path, copy, original):
    """Within a side the later module goes; between the sides the one to train on."""
    root = write_library(tmp_path)
    lines = (root / f"{original}.py").read_text().splitlines()
    lines[5:5] = ["changed = True", ""]
    assert not any(is_held_out(name) for name in ("zebra", "alpha")) and is_held_out("json")
    (root / f"{copy}.py").write_text("\n".join(["    " + line for line in lines]))
    corpus = read_library(root, min_bytes=1)
    kept = set(corpus.train) | set(corpus.held_out)
    assert corpus.duplicates == 1 and kept == (HELD_OUT | TRAIN | {copy}) - {max(copy, original, key=_goes_last)}


def _goes_last(name: str) -> tuple[bool, str]:
    return not is_held_out(name), name


def test_files_that_are_not_text_are_passed_over(tmp_path):
    root = write_library(tmp_path)
    (root / "latin.py").write_bytes("# ça va\n".encode("latin-1") + module_text(50).encode())
    (root / "nul.py").write_bytes(b"x = '\0'\n" + module_text(51).encode())
    (root / "empty.py").write_bytes(b"")
    assert set(read_library(root, min_bytes=1).train) == TRAIN


def test_a_library_without_sources_is_said(tmp_path):
    with pytest.raises(UserError, match=r"0 bytes of Python sources, at least 1,000,000 .*libpython3-stdlib"):
        read_library(tmp_path)


def test_this_pythons_own_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "json" / "__init__.py").exists():
        pytest.skip("this Python ships without its library's sources")
    corpus = read_library()
    assert not set(corpus.train) & set(corpus.held_out)
    assert not {"test", "tests", "site-packages"} & (set(corpus.train) | set(corpus.held_out))
    held_out, train = (sum(map(len, d)) for d in (corpus.held_out_documents, corpus.train_documents))
    assert 0.02 < held_out / (held_out + train) < 0.12
    assert "json" in corpus.held_out and "asyncio" in corpus.train


def test_shingles_ignore_indentation_and_blank_lines():
    assert library_corpus._shingles(b"a\n\n  b\nc\nd") == library_corpus._shingles(b"  a\nb\n\tc  \n\n d\n")
    assert len(library_corpus._shingles(b"a\nb")) == 1
