"""Files appear whole, or with whole lines, or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qwen2_jax.cli.output import check_writable, records, whole_file
from qwen2_jax.errors import UserError

WAYS = [whole_file, records]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("opened", WAYS)
def test_the_file_appears_when_the_block_ends_and_replaces_the_old_one(tmp_path, opened):
    target = tmp_path / "out"
    target.write_text("old\n")
    with opened(target) as file:
        print("new é", file=file)
        file.flush()
        assert target.read_text() == "old\n"
    assert target.read_text() == "new é\n"
    assert names(tmp_path) == ["out"]


def test_whole_file_leaves_what_was_there_when_the_block_fails(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(target, "wb") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_whether_a_file_can_be_written_is_asked_without_a_trace(tmp_path):
    (tmp_path / "old").write_text("old\n")
    os.mkfifo(tmp_path / "pipe")
    for name in ("old", "new", "pipe"):     # the last would wait for a reader
        check_writable(tmp_path / name)
    assert (tmp_path / "old").read_text() == "old\n" and names(tmp_path) == ["old", "pipe"]
    for name, why in (("", "it is a folder"), ("no/such", "No such file or directory")):
        with pytest.raises(UserError, match=why):
            check_writable(tmp_path / name)


def test_records_keep_finished_lines_when_the_block_fails(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), records(tmp_path / "out") as file:
        file.write("one\ntwo\nthr")
        raise ZeroDivisionError
    assert (tmp_path / "out").read_text() == "one\ntwo\n"
    assert names(tmp_path) == ["out"]
    assert "2 finished records kept in" in capsys.readouterr().err


def test_records_never_replace_an_older_file_by_an_unfinished_one(tmp_path):
    (tmp_path / "out").write_text("old\n")
    with pytest.raises(KeyboardInterrupt), records(tmp_path / "out") as file:
        file.write("one\n")
        raise KeyboardInterrupt
    assert (tmp_path / "out").read_text() == "old\n"
    assert (tmp_path / "out.partial").read_text() == "one\n"
    assert names(tmp_path) == ["out", "out.partial"]


def test_records_leave_nothing_when_nothing_was_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt), records(tmp_path / "out") as file:
        file.write("hal")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("nowhere", [None, "-"])
def test_records_to_stdout(nowhere, capsys):
    with records(nowhere) as file:
        assert file is sys.stdout
        print("one", file=file)
    assert capsys.readouterr().out == "one\n"


@pytest.mark.parametrize("opened", WAYS)
def test_unwritable_paths_are_refused_before_the_block(tmp_path, opened):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in [(tmp_path / "folder", "it is a folder"), (tmp_path / "gone" / "out", "No such file"),
                         (tmp_path / "file" / "out", "Not a directory"), (Path("/proc/out"), "cannot write /proc/out")]:
        with pytest.raises(UserError, match=reason), opened(path):
            pytest.fail("the block ran")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write a read-only file")
def test_a_write_protected_file_is_refused(tmp_path):
    target = tmp_path / "out"
    target.write_text("old")
    target.chmod(0o400)
    with pytest.raises(UserError, match="write-protected"), whole_file(target):
        pytest.fail("the block ran")


@pytest.mark.parametrize("opened", WAYS)
def test_a_full_device_is_a_sentence(opened):
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"), opened("/dev/full") as file:
        file.write("x" * 100_000)
        file.flush()


def test_devices_and_links_stay_what_they_are(tmp_path):
    with whole_file("/dev/null") as file:
        file.write("x")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link") as file:
        file.write("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"
