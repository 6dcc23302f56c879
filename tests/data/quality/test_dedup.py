"""Deduplication: which documents stay, whatever the order and however many processes look."""

from __future__ import annotations

import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data import text_source
from qwen2_jax.data.quality.dedup import Duplicate, deduplicate, find_duplicates
from qwen2_jax.data.quality.exact import digest
from qwen2_jax.data.quality.minhash import Signer
from qwen2_jax.data.quality.rules import MinHashRule
from qwen2_jax.data.quality.sift import Sieve
from qwen2_jax.data.source_files import SourceOptions, find_files
from qwen2_jax.errors import UserError

RULE = MinHashRule()
SIGNER = Signer(RULE)


def variants(count: int, texts: int = 4, words: int = 200) -> list[str]:
    """Texts with near copies (one word of 200 changed), equal copies, and a short one."""
    generator = random.Random(1)
    found = ["short"]
    for n in range(count):
        text = [f"t{n % texts}w{i}" for i in range(words)]
        if n % 3:
            text[generator.randrange(words)] = f"n{n}"
        found.append(" ".join(text))
    return found


def duplicates_of(texts: list[str], rule: MinHashRule | None) -> dict[int, Duplicate]:
    return find_duplicates([(digest(text), SIGNER(text) if rule else None) for text in texts], rule)


@given(st.lists(st.sampled_from("abcd"), max_size=12).flatmap(
    lambda texts: st.tuples(st.just(texts), st.permutations(texts))))
def test_the_set_that_stays_does_not_depend_on_the_order(both):
    texts, permuted = both

    def staying(order):
        gone = duplicates_of(order, None)
        assert all(order[n] == order[duplicate.of] and duplicate.of < n and duplicate.of not in gone
                   for n, duplicate in gone.items())
        return [text for n, text in enumerate(order) if n not in gone]

    assert sorted(staying(texts)) == sorted(staying(permuted)) == sorted(set(texts))
    assert staying(texts) == list(dict.fromkeys(texts))     # the first stays


def test_near_and_equal_copies():
    base = " ".join(f"w{i}" for i in range(200))
    near = base.replace("w100 ", "other ")
    texts = [near, base, near, "w1 w2", base, "!!!", "???", "!!!"]
    found = duplicates_of(texts, RULE)
    assert {n: duplicate.of for n, duplicate in found.items()} == {1: 0, 2: 0, 4: 0, 7: 5}
    assert found[2].similarity is None and found[7].similarity is None
    assert found[1].similarity == found[4].similarity and found[1].similarity >= 0.8


def run(tmp_path, rows: list[bytes], workers: int = 1, name: str = "in.jsonl", **kwargs):
    (tmp_path / name).write_bytes(b"".join(rows))
    options = SourceOptions(**kwargs)
    sieve = Sieve(io.BytesIO(), io.StringIO())
    deduplicate(find_files([str(tmp_path / name)], options), options, sieve, rule=RULE, workers=workers, max_bad_rows=1)
    removed = [json.loads(line) for line in sieve.removed_lines.getvalue().splitlines()]
    return sieve.kept_lines.getvalue(), removed, sieve


def test_rows_stay_byte_for_byte(tmp_path):
    rows = [b'{"text": "a",  "x": 1.50, "y": "\\u00e9"}\r\n', b'{"y":1e3,"text":"b"}\n', b'{"text": "a"}\n',
            b"no json\n", b'{"text": "\xe6\x97\xa5"}']
    kept, removed, sieve = run(tmp_path, [b"\xef\xbb\xbf", *rows])
    assert kept == rows[0].replace(b"\r", b"") + rows[1] + rows[4] + b"\n"
    path = str(tmp_path / "in.jsonl")
    assert removed == [
        {"file": path, "row": 3, "reason": "exact_duplicate", "of_file": path, "of_row": 1},
        {"file": path, "row": 4, "reason": "bad_row", "problem": "no JSON: Expecting value at character 0"}]
    assert sieve.summary() == "3 of 5 rows kept, 2 removed\n  exact duplicate: 1\n  bad row: 1"


def test_other_formats_become_json(tmp_path):
    kept, removed, _ = run(tmp_path, ["eins\n\nzwei „ö“\n\neins\n".encode()], name="in.txt", document="paragraph")
    assert [json.loads(line) for line in kept.splitlines()] == [{"text": "eins"}, {"text": "zwei „ö“"}]
    assert (removed[0]["row"], removed[0]["of_row"]) == (5, 1)


def test_workers_and_repeats_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE_BYTES", 20_000)
    rows = [json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(variants(40) * 5)]
    kept, removed, _ = run(tmp_path, rows)
    assert len(kept.splitlines()) == 5
    assert {row["reason"] for row in removed} == {"exact_duplicate", "near_duplicate"}
    assert run(tmp_path, rows, workers=2)[:2] == (kept, removed)
    assert run(tmp_path, [kept])[:2] == (kept, [])      # once is enough


def test_text_without_duplicates_is_left_alone(tmp_path):
    generator = random.Random(2)
    rows = [json.dumps({"text": " ".join(generator.choices("abcdefghij", k=300))}).encode() + b"\n" for _ in range(200)]
    kept, removed, _ = run(tmp_path, rows)
    assert (kept, removed) == (b"".join(rows), [])


def test_too_many_bad_rows(tmp_path):
    with pytest.raises(UserError, match="--max-bad-rows is 1"):
        run(tmp_path, [b"no json\n"] * 2)
