import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from qwen2_jax.checkpoint.staging import staged
from qwen2_jax.errors import UserError


def test_the_folder_appears_at_the_end_only(tmp_path):
    dst = tmp_path / "new/dst"
    with staged(dst) as partial:
        (partial / "file").write_text("x")
        assert not dst.exists() and partial.name.startswith("dst.partial-")
    assert (dst / "file").read_text() == "x"
    assert [p.name for p in dst.parent.iterdir()] == ["dst"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(error, tmp_path):
    with pytest.raises(error), staged(tmp_path / "dst") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda dst: dst.mkdir(), lambda dst: dst.write_text(""),
                                  lambda dst: dst.symlink_to("nowhere")])
def test_whatever_exists_under_the_name_stays(make, tmp_path):
    make(tmp_path / "dst")
    with pytest.raises(UserError, match="already exists"), staged(tmp_path / "dst"):
        raise AssertionError("the body must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="appeared while"), staged(tmp_path / "dst"):
        (tmp_path / "dst").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/dst: (Not a directory|File exists)"):
        with staged(tmp_path / "file/dst"):
            raise AssertionError("the body must not run")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError])
def test_a_full_disk_is_named_whoever_reports_it(code, kind, tmp_path):
    text = os.strerror(code)
    error = OSError(code, text) if kind is OSError else kind(f"RESOURCE_EXHAUSTED: {text} [x]")
    with pytest.raises(UserError, match=r"no space left on the disk of .*dst"), staged(tmp_path / "dst"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_the_users(tmp_path):
    with pytest.raises(ValueError, match="ours"), staged(tmp_path / "dst"):
        raise ValueError("ours")


def test_more_than_is_free_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no space left"), staged(tmp_path / "dst", needed=10**18):
        raise AssertionError("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_with_our_process_id_are_replaced(tmp_path):
    stale = tmp_path / f"dst.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "old").write_text("old")
    with staged(tmp_path / "dst") as partial:
        assert list(partial.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_works_outside_the_main_thread(tmp_path):
    def body():
        with staged(tmp_path / "dst"):
            pass

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert (tmp_path / "dst").is_dir()


def test_the_handler_of_sigterm_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with staged(tmp_path / "dst"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


WAITING = """
import sys, time
from pathlib import Path
from qwen2_jax.checkpoint.staging import staged
with staged(Path(sys.argv[1])) as partial:
    (partial / "file").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_signals(number, left, process_env, tmp_path):
    with subprocess.Popen([sys.executable, "-c", WAITING, tmp_path / "dst"], env=process_env,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        process.send_signal(number)
        process.wait(20)
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == left and all(re.fullmatch(r"dst\.partial-\d+", name) for name in names)
    with staged(tmp_path / "dst"):
        pass
    assert (tmp_path / "dst").is_dir()
