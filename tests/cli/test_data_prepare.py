"""`qwen2-jax data prepare` as a user types it."""

from __future__ import annotations

import json
import re

import pytest

from qwen2_jax.data.shards import TokenShards
from qwen2_jax.data.train_tokenizer import train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(["some text to train on, " * 9], 290, tmp_path_factory.mktemp("tokenizer"))


def test_prepare_then_again_then_with_another_key(tokenizer, tmp_path, run_cli):
    rows = [{"text": "one"}, {"text": 2}, {"body": "x"}, {"text": "four"}]
    (tmp_path / "my data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("data", "prepare", tmp_path / "my data.jsonl", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    done = run_cli(*command, "--workers", 2)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"qwen2-jax: error: .*my data\.jsonl:2: 'text' is a number instead of a string; 1 bad row, and "
                        r"--max-bad-rows is 0: mend the data, or allow more", last)
    done = run_cli(*command, "--max-bad-rows", 2)
    assert (done.returncode, done.stdout) == (
        0, f"{tmp_path / 'out'}: 2 documents, 9 tokens, 1 shard, 2 bad rows skipped\n")
    assert f"qwen2-jax: {tmp_path / 'my data.jsonl'}:3: no key 'text', only 'body': skipped\n" in done.stderr
    assert "tokens]" in done.stderr     # the progress bar
    assert len(TokenShards(tmp_path / "out")) == 2
    done = run_cli(*command)
    assert done.returncode == 0 and done.stderr == f"qwen2-jax: {tmp_path / 'out'} is prepared already: nothing to do\n"
    done = run_cli(*command, "--text-key", "body")
    assert (done.returncode, done.stdout) == (2, "")
    assert "out was prepared from something else: text_key was 'text', is 'body'" in done.stderr


@pytest.mark.parametrize(("argv", "message"), [
    (["data"], "data needs a subcommand: prepare"),
    (["data", "prepre", "--out", "x"], "command 'prepre' does not exist, did you mean prepare?"),
    (["data", "prepare", "x.jsonl", "--ot", "x"], "unknown flag '--ot', did you mean --out"),
    (["data", "prepare", "--out", "x", "--tokenizer", "y"], "the following arguments are required: SRC"),
])
def test_mistyped(run_cli, argv, message):
    done = run_cli(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]


def test_help_shows_an_example_of_each_source(run_cli):
    done = run_cli("data", "prepare", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for word in (".jsonl", ".parquet", "gs://", "tfds:NAME", "--max-bad-rows", "kill -9"):
        assert word in done.stdout
