"""Decontamination of files: what goes, what is said of it, and of the evaluation sets."""

from __future__ import annotations

import io
import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.data import text_source
from qwen2_jax.data.quality.decontaminate import contamination, decontaminate
from qwen2_jax.data.quality.evaluation_sets import read_evaluation_sets
from qwen2_jax.data.quality.rules import OVERLAP_RULES, Overlap
from qwen2_jax.data.quality.sift import Sieve
from qwen2_jax.data.source_files import SourceOptions, find_files

QUESTION = " ".join(f"q{i}" for i in range(30))
ANSWER = " ".join(f"a{i}" for i in range(20))


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, texts, rows, overlap: Overlap = OVERLAP_RULES["qwen2"], **kwargs):
    evaluation, read = read_evaluation_sets([write(tmp_path / "eval.jsonl", rows)])
    options = SourceOptions()
    files = find_files([write(tmp_path / "in.jsonl", [{"text": text} for text in texts])], options)
    sieve = Sieve(io.BytesIO(), io.StringIO())
    touched = decontaminate(files, options, sieve, evaluation=evaluation, overlap=overlap, **kwargs)
    removed = [json.loads(line) for line in sieve.removed_lines.getvalue().splitlines()]
    kept = [json.loads(line)["text"] for line in sieve.kept_lines.getvalue().splitlines()]
    return kept, removed, contamination(touched, evaluation, read, overlap)


def test_planted_contamination(tmp_path):
    rows = [{"question": "Not in there at all?", "answer": "No."}, {"question": QUESTION, "answer": ANSWER}]
    phrase = " ".join([*QUESTION.split()[:13], *(f"own{i}" for i in range(60))])
    copy = f"Before it. {ANSWER.upper()}! And behind."
    kept, removed, lines = run(tmp_path, ["Clean text.", copy, phrase], rows)
    assert kept == ["Clean text.", phrase]
    path, evaluation = str(tmp_path / "in.jsonl"), str(tmp_path / "eval.jsonl")
    assert removed == [{
        "file": path, "row": 2, "reason": "overlaps_evaluation_text", "evaluation_file": evaluation,
        "evaluation_row": 2, "evaluation_key": "answer", "lcs": 20, "words": 24, "evaluation_words": 20,
        "shared": " ".join(ANSWER.split()[:13])}]
    assert lines == [f"{evaluation}: 1 of 2 rows share a run of 13 with a document (compared: question, answer)"]


def test_equal_texts_under_qwen2_math(tmp_path):
    texts = ["What, when, why?", "What, when, why, who?", "That is it"]
    kept, removed, _ = run(tmp_path, texts, [{"answer": "That is it.", "question": "what when why"}],
                           OVERLAP_RULES["qwen2_math"])
    assert kept == texts[1:]
    assert (removed[0]["reason"], removed[0]["shared"]) == ("equals_evaluation_question", "what when why")


def test_bad_rows_are_told(tmp_path):
    _, removed, _ = run(tmp_path, ["", "text"], [{"question": QUESTION}], max_bad_rows=1)
    assert [row["reason"] for row in removed] == ["bad_row"]


def test_tokens_instead_of_words(tmp_path, trained_folder, trained):
    """A copy of 6 words that are 13 tokens and more; the first word has others behind a space."""
    question = "subprocess argparse dataclasses inspection misunderstanding completeness"
    assert len(question.split()) == 6 and len(trained.encode(question)) >= 13
    text = f"Look: {question}!"
    assert run(tmp_path, [text], [{"question": question}])[0] == [text]
    kept, removed, _ = run(tmp_path, [text], [{"question": question}], tokenizer=trained_folder)
    assert kept == []
    assert removed[0]["evaluation_words"] == len(trained.encode(question)) > removed[0]["lcs"] >= 13
    assert removed[0]["shared"].strip() and removed[0]["shared"].strip() in question


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE_BYTES", 20_000)
    generator = random.Random(0)
    texts = [" ".join(generator.choices([QUESTION, ANSWER, "some other words"], k=40)) for _ in range(400)]
    texts = [text if n % 3 else " ".join(generator.choices("abc", k=400)) for n, text in enumerate(texts)]
    rows = [{"question": QUESTION, "answer": ANSWER}]
    one = run(tmp_path, texts, rows)
    assert len(one[0]) == 134 and len(one[1]) == 266
    assert run(tmp_path, texts, rows, workers=2) == one


words = st.sampled_from("ab").flatmap(lambda letter: st.lists(st.just(letter) | st.sampled_from("abcd"), max_size=12))


@settings(max_examples=30)
@given(st.lists(words.map(" ".join).filter(bool), max_size=5), st.lists(words.map(" ".join).filter(bool), min_size=1,
                                                                        max_size=3))
def test_removing_twice_removes_nothing_more(tmp_path_factory, texts, questions):
    folder = tmp_path_factory.mktemp("twice")
    rule = Overlap(ngram=3, min_lcs=3)
    rows = [{"question": question} for question in questions]
    kept, removed, _ = run(folder, texts, rows, rule)
    assert len(kept) + len(removed) == len(texts)
    assert run(folder, kept, rows, rule)[:2] == (kept, [])
    others = [text.translate(str.maketrans("abcd", "wxyz")) for text in texts]
    assert run(folder, others, rows, rule)[:2] == (others, [])      # nothing in common: nothing changes
