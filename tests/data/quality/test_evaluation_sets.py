"""Evaluation sets as they come: formats, keys, and what is said of files that have nothing."""

from __future__ import annotations

import gzip
import json

import pytest

from qwen2_jax.data.quality.evaluation_sets import read_evaluation_sets
from qwen2_jax.errors import UserError


def taken(path, keys=()):
    texts, (file,) = read_evaluation_sets([str(path)], keys)
    assert sum(file.taken.values()) == len(texts)
    assert file.path == str(path)
    return [(text.row, text.key, text.text) for text in texts]


ROWS = [{"question": "What?", "answer": "That.", "id": "7"}, {"question": "Who?", "answer": ["A", "B"], "id": "8"}]
TEXTS = [(1, "question", "What?"), (1, "answer", "That."), (2, "question", "Who?"), (2, "answer", "A"),
         (2, "answer", "B")]


def test_json_lines(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, ROWS)).encode() + b"\r\n")
    assert taken(path) == TEXTS


def test_json_lines_compressed(tmp_path):
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert taken(path) == TEXTS


def test_json(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert taken(path) == TEXTS
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert taken(path) == TEXTS


def test_json_of_nested_objects(tmp_path):
    path = tmp_path / "exemplars.json"
    path.write_text(json.dumps({"en": {"1": {"Q": "What?", "a": "That."}, "n": 3}, "turns": [["one"], {"x": "two"}]}))
    assert taken(path) == [(1, "Q", "What?"), (1, "a", "That."), (1, "turns", "one"), (1, "turns", "two")]


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, ending, between):
    path = tmp_path / f"set.{ending}"
    path.write_text(f'Type{between}Best Answer{between}Question\nx{between}"a {between}\nb"{between}' + "q" * 200_000)
    assert taken(path) == [(1, "Best Answer", f"a {between}\nb"), (1, "Question", "q" * 200_000)]


def test_keys_may_be_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert taken(path, ["ID"]) == [(1, "id", "7"), (2, "id", "8")]
    assert [text for _, _, text in taken(path, ["*"])] == ["What?", "That.", "7", "Who?", "A", "B", "8"]


@pytest.mark.parametrize(("name", "content", "keys", "message"), [
    ("a.jsonl", '{"foo": "x", "bar": "y"}', (), "no text under the usual keys: .*--eval-key .*there are 'foo', 'bar'"),
    ("a.jsonl", '{"question": "x"}', ("fragen",), "no text under 'fragen': .*there are 'question'"),
    ("a.jsonl", "", (), "it has no text at all"),
    ("a.jsonl", '{"question": " "}', (), "no text"),
    ("a.jsonl", '{"question": "x"}\n{"question"', (), "a.jsonl, line 2 is no JSON"),
    ("a.json", "[{]", (), "a.json, line 1 is no JSON"),
    ("a.txt", "question", (), "evaluation sets are read as .jsonl, .json, .csv or .tsv"),
    ("a.csv", b"question\n\xff", (), "a.csv is no UTF-8 at byte 9"),
    ("a.jsonl.gz", b"nothing", (), "a.jsonl.gz is damaged"),
])
def test_refuses(tmp_path, name, content, keys, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_evaluation_sets([str(path)], keys)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_evaluation_sets([str(tmp_path / "none.jsonl")])


def test_the_common_sets(shared):
    """The keys that the usual ones find in real files."""
    folder = shared / "data" / "eval"
    expected = {
        "gsm8k_test.jsonl.gz": {"question": 1319, "answer": 1319},
        "humaneval.jsonl.gz": {"prompt": 164, "canonical_solution": 164},
        "mbpp.jsonl.gz": {"text": 974, "code": 974},
        "mt_bench_questions.jsonl": {"turns": 160, "reference": 70},
        "truthfulqa.csv": {"Question": 817, "Best Answer": 817, "Correct Answers": 817},
        "ifeval.jsonl.gz": {"prompt": 541},
        "mgsm_exemplars.json": {"q": 88, "a": 88},
    }
    _, read = read_evaluation_sets([str(folder / name) for name in expected])
    assert [dict(file.taken) for file in read] == list(expected.values())
