"""Which step folders count, which stay, and what is cleaned away."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.checkpoint import step_folders as step_folders_module
from qwen2_jax.checkpoint.digests import Record, digest_files, file_names, write_record
from qwen2_jax.checkpoint.step_folders import (
    check_ours,
    clean,
    committed_steps,
    kept,
    lock,
    mark_saving,
    newest_good,
    newest_step,
    remove_step,
    step_folders,
    unmark_saving,
)
from qwen2_jax.errors import UserError
from tests.conftest import ROOT


def make(path, step, *, committed=True):
    folder = path / str(step)
    (folder / "params").mkdir(parents=True)
    (folder / "params/data").write_text(f"of {step}")
    if committed:
        write_record(folder, Record(step, digest_files(folder, file_names(folder))))
    return folder


def test_a_step_counts_from_its_digests_on(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 10)
    mark_saving(tmp_path, 12)
    make(tmp_path, 12, committed=False)
    for other in ("-3", "07", "x", "³", "12.orbax-checkpoint-tmp", "4.removing"):
        (tmp_path / other).mkdir()
    (tmp_path / "30").write_text("a file")
    assert step_folders(tmp_path) == committed_steps(tmp_path) == [2, 10]
    write_record(tmp_path / "12", Record(12, {}))
    assert committed_steps(tmp_path) == [2, 10, 12]
    unmark_saving(tmp_path, 12)
    assert committed_steps(tmp_path) == [2, 10, 12]
    assert step_folders(tmp_path / "none") == []


def test_what_is_unfinished_is_cleaned_away_and_nothing_else(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 3, committed=False)      # nobody says that it is unfinished
    for step, committed in ((4, True), (5, False)):
        mark_saving(tmp_path, step)
        make(tmp_path, step, committed=committed)
    mark_saving(tmp_path, 6)
    for left in ("6.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-123", "1.removing"):
        (tmp_path / left / "params").mkdir(parents=True)
    (tmp_path / "8.saving.partial").write_text("")
    (tmp_path / "2/digests.json.partial").write_text("")
    for theirs in ("notes.txt", "x.saving", "9.saved"):
        (tmp_path / theirs).write_text("")
    clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3", "4", "notes.txt", "x.saving", "9.saved"}
    assert not (tmp_path / "2/digests.json.partial").exists() and committed_steps(tmp_path) == [2, 4]


def test_a_mark_of_removal_beside_the_folder_as_in_a_bucket(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 3)
    (tmp_path / "2.removing").write_bytes(b"")
    assert committed_steps(tmp_path) == [3]
    clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"3"}


def test_removing(tmp_path, monkeypatch):
    make(tmp_path, 2)
    remove_step(tmp_path, 2)
    assert not list(tmp_path.iterdir())
    make(tmp_path, 3)

    def refused(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(step_folders_module.shutil, "rmtree", refused)
    with pytest.raises(PermissionError):
        remove_step(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["3.removing"]       # of which the next opening takes care


def test_newest(tmp_path):
    assert newest_step(tmp_path) is None and newest_good(tmp_path) is None
    make(tmp_path, 1, committed=False)
    make(tmp_path, 2, committed=False)
    assert newest_step(tmp_path) == 2       # of a version without digests
    with pytest.raises(UserError, match=r"checkpoints without digests.json \(the last of step 2\).*choose another"):
        check_ours(tmp_path)
    make(tmp_path, 3)
    make(tmp_path, 4)
    assert newest_step(tmp_path) == 4 == newest_good(tmp_path)
    check_ours(tmp_path)
    (tmp_path / "4/params/data").write_text("other")
    assert newest_good(tmp_path) == 3 and newest_step(tmp_path) == 4
    (tmp_path / "4/digests.json").unlink()
    with pytest.raises(UserError, match=r"/4 is damaged: digests.json is missing; .* step 3: go on from .*/3$"):
        newest_step(tmp_path)


steps = st.dictionaries(st.integers(0, 40), st.none() | st.floats())


@given(steps, st.integers(1, 4), st.none() | st.integers(1, 7), st.integers(0, 3))
def test_kept(metrics, last, every, best):
    found = kept(metrics, last=last, every=every, best=best)
    assert found <= metrics.keys()
    assert not metrics or max(metrics) in found
    for step, value in metrics.items():
        newer = sum(s > step for s in metrics)
        finite = value is not None and abs(value) < float("inf")
        better = sum(v is not None and abs(v) < float("inf") and (v < value or (v == value and s > step))
                     for s, v in metrics.items()) if finite else 0
        wanted = newer < last or step == 0 or (every is not None and step % every == 0) or (finite and better < best)
        assert (step in found) == wanted


def test_a_folder_has_one_writer(tmp_path):
    take = ("from pathlib import Path; from qwen2_jax.checkpoint.step_folders import lock\n"
            f"try: lock(Path({str(tmp_path)!r}), object)\nexcept Exception as e: print(e)")

    def in_another_process():
        return subprocess.run([sys.executable, "-c", take], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    unlock = lock(tmp_path, test_kept)
    assert "another run is writing checkpoints to" in in_another_process()
    with pytest.raises(UserError, match="another run is writing"):
        lock(tmp_path, test_kept)
    unlock()
    assert in_another_process() == ""
