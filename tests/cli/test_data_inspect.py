"""Rows as text: what is trained on is told apart, documents end where they end, and no document steers the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.cli.data_inspect import row_spans
from qwen2_jax.cli.main import entry
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.data.prepare import prepare
from qwen2_jax.data.train_tokenizer import train_sentencepiece

TEXTS = ["The quick brown fox.\nIt jumps.", "北京市 🤗 and more of it", "steer\x1b[2Jme\u202e away"] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_sentencepiece(["The quick brown fox jumps over the dog. " * 20], 300, tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    source = tmp_path_factory.mktemp("text") / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = tmp_path_factory.mktemp("data") / "prepared"
    prepare([str(source)], out, tokenizer, workers=1)
    return out


def inspect(capsys, *argv: object) -> str:
    assert entry(["data", "inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_rows_are_shown_as_text(capsys, folder, tokenizer):
    shown = inspect(capsys, folder, "--tokenizer", tokenizer, "--seq", 40, "--batch", 16, "--rows", 16)
    assert "step 0, row 15: 40 positions, 40 trained on, 0.0% padding" in shown
    assert "step 0, all 16 rows: 640 positions, 640 trained on, 0.0% padding" in shown
    whole = re.findall(r"── document (\d+), all [\d,]+ tokens ──\n(.*?)\n(?:──|\nstep)", shown, re.DOTALL)
    assert whole
    for document, text in whole:
        visible = TEXTS[int(document)].replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        assert re.match("⟦.*?⟧", text) and text.replace("⟦", "").replace("⟧", "") == f"{visible}<|endoftext|>"
    assert "\x1b" not in shown and "\u202e" not in shown
    assert re.search(r"document \d, tokens \d+ to \d+ of 0 to \d+", shown), "a document that is cut says where"


def test_without_a_tokenizer_ids_are_shown(capsys, folder):
    shown = inspect(capsys, folder, "--seq", 16, "--rows", 1)
    assert re.search(r"\n⟦\d+ ⟧\d+ ", shown)
    assert shown.count("\nstep 0, row") == 1


def test_steps_and_seeds_show_other_rows(capsys, folder):
    shown = {inspect(capsys, folder, "--seq", 16, *more) for more in ((), ("--step", 1), ("--seed", 1))}
    assert len(shown) == 3


@pytest.mark.parametrize("no_color", [None, "1"])
def test_a_terminal_gets_colours_unless_it_is_told_not_to(folder, process_env, no_color):
    env = process_env | ({"NO_COLOR": no_color} if no_color else {})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qwen2_jax", "data", "inspect", str(folder), "--seq", "16", "--rows", "1"]
    subprocess.run(command, stdout=theirs, env=env, timeout=60, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert ("\x1b[31m" in shown and "\x1b[32m" in shown) == (no_color is None)
    assert ("⟦" in shown) == (no_color is not None)


def test_jax_is_not_imported(folder, process_env):
    code = ("import sys; from qwen2_jax.cli.main import entry; "
            f"entry(['data', 'inspect', {str(folder)!r}]); sys.exit('jax' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], env=process_env, check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_targets_that_do_not_count_are_told_apart():
    """A conversation: two answers of three tokens among what is given."""
    ids = np.arange(10)[None]
    weights = np.array([[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]], np.float32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    batch = PackedBatch(ids, ids + 1, segments, ids, weights)
    assert row_spans(batch, 0) == [[(False, [0, 1, 2]), (True, [3, 4]), (False, [5])],
                                   [(False, [5, 6]), (True, [7, 8])]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seq", "0"], "--seq must be at least 1, found 0"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--step", "-1"], "--step must be at least 0, found -1"),
        (["--rows", "0"], "--rows must be at least 1, found 0"),
        (["--seed", "-1"], "the seed must be from 0"),
        (["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(capsys, folder, argv, said):
    assert entry(["data", "inspect", str(folder), *argv]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_another_tokenizer_is_refused(capsys, folder, tmp_path):
    other = train_sentencepiece(["A jolly good text, unlike the other. " * 20], 290, tmp_path / "other")
    assert entry(["data", "inspect", str(folder), "--tokenizer", str(other)]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err
