"""`qwen2-jax data dedup|filter|decontaminate`: what they write, what they say, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_jax.data.quality.rules import GopherRules, MinHashRule, Overlap
from qwen2_jax.settings import settings

QUESTION = " ".join(f"question{i}" for i in range(20))
GOOD = " ".join(f"{a}{b}word" for a in "abcdefgh" for b in "abcdefgh")


def write(path: Path, *texts: str, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_dedup(call, tmp_path):
    near = GOOD + " and more"
    source = write(tmp_path / "in.jsonl", GOOD, "b", near, GOOD, "b")
    done = call("data", "dedup", source, "--out", tmp_path / "out.jsonl", "--workers", "1")
    assert (done.returncode, done.stdout) == (0, "")
    assert [row["n"] for row in lines(tmp_path / "out.jsonl")] == [0, 1]
    removed = lines(tmp_path / "out.removed.jsonl")
    assert [(row["row"], row["reason"], row["of_row"]) for row in removed] == [
        (3, "near_duplicate", 1), (4, "exact_duplicate", 1), (5, "exact_duplicate", 2)]
    assert "2 of 5 rows kept, 3 removed\n  exact duplicate: 2\n  near duplicate: 1\n" in done.stderr
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.removed.jsonl"]


def test_dedup_exact_and_settings(call, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, GOOD + " and more", GOOD)
    for argv, kept in ((("--exact",), 2), (("--set", "threshold=1.0"), 2), ((), 1)):
        assert call("data", "dedup", source, "--out", tmp_path / "out.jsonl", "--workers", "1", *argv).returncode == 0
        assert len(lines(tmp_path / "out.jsonl")) == kept


def test_filter(call, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, "too short")
    done = call("data", "filter", source, "--out", tmp_path / "out.jsonl", "--workers", "1")
    assert [row["n"] for row in lines(tmp_path / "out.jsonl")] == [0]
    assert lines(tmp_path / "out.removed.jsonl")[0]["reason"] == "min_words"
    assert "  min words: 1\n" in done.stderr
    call("data", "filter", source, "--out", tmp_path / "out.jsonl", "--workers", "1", "--set", "min_words=2")
    assert len(lines(tmp_path / "out.jsonl")) == 2


def test_filter_by_language(call, tmp_path):
    source = write(tmp_path / "in.jsonl", "Born free and equal in dignity and rights.", "Libres et égaux en dignité.")
    assert call("data", "filter", source, "--out", tmp_path / "out.jsonl", "--workers", "1", "--languages", "fr, de",
                "--no-heuristics").returncode == 0
    assert [row["n"] for row in lines(tmp_path / "out.jsonl")] == [1]


def test_decontaminate(call, tmp_path):
    evaluation = write(tmp_path / "eval.jsonl", QUESTION, "and another one", key="question")
    source = write(tmp_path / "in.jsonl", "clean", f"{QUESTION} and so on", "and another one", key="body")
    argv = ("data", "decontaminate", source, "--text-key", "body", "--eval", evaluation, "--workers", "1",
            "--out", tmp_path / "out.jsonl")
    done = call(*argv)
    assert [row["n"] for row in lines(tmp_path / "out.jsonl")] == [0, 2]
    assert "  overlaps evaluation text: 1\n" in done.stderr
    assert f"{evaluation}: 1 of 2 rows share a run of 13 with a document (compared: question)\n" in done.stderr
    call(*argv, "--rule", "qwen2_math")
    assert [row["n"] for row in lines(tmp_path / "out.jsonl")] == [0]
    call(*argv, "--set", "min_lcs=21")
    assert len(lines(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize(("argv", "message"), [
    (("dedup", "in.jsonl", "--out", "in.jsonl"), "is to be read and to be written: name another --out"),
    (("dedup", "in.jsonl", "--out", "out.jsonl.gz"), "name a file that ends with .jsonl"),
    (("dedup", "none.jsonl", "--out", "out.jsonl"), "none.jsonl does not exist"),
    (("dedup", "in.jsonl", "--out", "out.jsonl", "--set", "treshold=0.7"), "did you mean threshold?"),
    (("dedup", "in.jsonl", "--out", "out.jsonl", "--workers", "0"), "--workers is 0: it must be at least 1"),
    (("filter", "in.jsonl", "--out", "out.jsonl", "--no-heuristics"), "nothing to filter by"),
    (("filter", "in.jsonl", "--out", "out.jsonl", "--languages", "xx"), "language 'xx' is not known"),
    (("decontaminate", "in.jsonl", "--out", "out.jsonl", "--eval", "in.jsonl", "--eval-key", "x"),
     "has no text under 'x'"),
    (("decontaminate", "in.jsonl", "--out", "out.jsonl", "--eval", "in.jsonl", "--rule", "qwen3"), "--rule"),
])
def test_refuses_in_one_line_and_leaves_nothing(call, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    before = write(Path("in.jsonl"), GOOD).read_bytes()
    done = call("data", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("qwen2-jax: error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert (names(tmp_path), Path("in.jsonl").read_bytes()) == (["in.jsonl"], before)


def test_a_bad_row_leaves_what_was_there(call, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, GOOD)
    out = ("--out", tmp_path / "out.jsonl", "--workers", "1")
    call("data", "dedup", source, *out)
    before = (tmp_path / "out.jsonl").read_bytes()
    with source.open("a") as file:
        file.write("no json\n")
    done = call("data", "dedup", source, *out)
    assert done.returncode == 2 and f"{source}:3: no JSON" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert call("data", "dedup", source, *out, "--max-bad-rows", "1").returncode == 0
    assert lines(tmp_path / "out.removed.jsonl")[-1]["reason"] == "bad_row"
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.removed.jsonl"]


@pytest.mark.parametrize(("name", "rules"), [("dedup", MinHashRule()), ("filter", GopherRules()),
                                             ("decontaminate", Overlap())])
def test_help_lists_every_setting(call, name, rules):
    done = call("data", name, "--help")
    assert done.returncode == 0
    for setting in settings(rules):
        assert f"  {setting.name}=" in done.stdout and setting.help in done.stdout
