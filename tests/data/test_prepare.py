"""Shards are what the tokenizer says of each document, whatever number of workers and kills it took."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.data import prepare as prepare_module
from qwen2_jax.data import shard_writer
from qwen2_jax.data.prepare import prepare
from qwen2_jax.data.shards import TokenShards
from qwen2_jax.data.source_files import SourceOptions
from qwen2_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 3000


def documents_of(seed: int, number: int) -> list[str]:
    """Lengths from one character to some thousands, with everything that a tokenizer may stumble on."""
    draw = random.Random(seed)
    words = ["the", "naïve", "北京", "<|endoftext|>", "<|im_start|>", "\x00", "def f(x):\n", "\r\n", " ", "\ufeff"]
    return ["=" + "".join(draw.choices(words, k=draw.choice([1, 3, 10, 40, 400]))) for _ in range(number)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, seed in (("a.jsonl", 1), ("b naïve.jsonl.gz", 2)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents_of(seed, 120)).encode()
        (folder / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    for number, text in enumerate(documents_of(3, 20)):
        (folder / f"c{number:02d}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("qwen2_jax.data.text_source.PIECE_BYTES", 2000)
    monkeypatch.setattr("qwen2_jax.data.prepare.PIECE_BYTES", 2000)


@pytest.fixture(scope="module")
def expected(corpus, trained_folder, tmp_path_factory) -> Path:
    """The corpus, prepared in one go."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen2_jax.data.text_source.PIECE_BYTES", 2000)
        patch.setattr("qwen2_jax.data.prepare.PIECE_BYTES", 2000)
        prepare([str(corpus)], out, trained_folder, workers=1, shard_tokens=SHARD_TOKENS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(corpus: Path, out: Path, tokenizer: Path, **options) -> TokenShards:
    return prepare([str(corpus)], out, tokenizer, **{"workers": 1, "shard_tokens": SHARD_TOKENS} | options)


def test_tokens_are_the_tokenizers(corpus, expected, trained):
    shards = TokenShards(expected)
    texts = [*documents_of(1, 120), *documents_of(2, 120), *documents_of(3, 20)]
    assert len(shards) == len(texts)
    end = trained.control_tokens["<|endoftext|>"]
    assert (shards.end_token, shards.vocab) == (end, trained.vocab_size)
    for number, text in enumerate(texts):
        tokens = shards.tokens(number, 0, int(shards.lengths[number])).tolist()
        assert tokens == [*trained.encode(text, special=False), end]
        assert tokens.count(end) == 1       # what a document says of control tokens are characters
        assert trained.decode(tokens[:-1]) == text
    shards.verify()


def test_what_the_folder_holds(corpus, expected, trained_folder):
    manifest = json.loads((expected / "manifest.json").read_text())
    files = [name for shard in manifest["shards"] for name in (shard["file"], shard["lengths_file"])]
    assert set(contents(expected)) == {"manifest.json", *files}
    assert files[:2] == ["shard-00000.npy", "shard-00000.lengths.npy"] and len(manifest["shards"]) > 5
    for shard in manifest["shards"]:
        tokens, lengths = np.load(expected / shard["file"]), np.load(expected / shard["lengths_file"])
        assert (tokens.dtype, lengths.dtype) == (np.uint16, np.uint32)
        assert (len(tokens), len(lengths)) == (shard["tokens"], shard["documents"])
        assert lengths.sum() == len(tokens)
    assert all(shard["tokens"] >= SHARD_TOKENS for shard in manifest["shards"][:-1])
    assert (manifest["documents"], manifest["skipped"], manifest["format"]) == (260, 0, 1)
    assert manifest["tokens"] == sum(shard["tokens"] for shard in manifest["shards"])
    sha256 = hashlib.sha256((trained_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer_sha256"] == sha256


def test_workers_change_nothing(corpus, expected, trained_folder, tmp_path):
    run(corpus, tmp_path / "out", trained_folder, workers=3)
    assert contents(tmp_path / "out") == contents(expected)


class Killed(BaseException):
    """Stands for the end of the process: nothing behind it runs, as far as files are concerned."""


def killed_at(call: int, monkeypatch) -> None:
    """The run ends in its `call`th write to any file, which is half done; nothing is written after it."""
    write, calls = shard_writer._write, iter(range(1 << 30))

    def half(file: int, data: bytes) -> None:
        now = next(calls)
        if now == call:
            os.write(file, data[: len(data) // 2])
        if now >= call:
            raise Killed
        write(file, data)

    monkeypatch.setattr(shard_writer, "_write", half)


def test_a_run_killed_in_any_write_goes_on_to_the_same_bytes(corpus, expected, trained_folder, tmp_path, monkeypatch,
                                                             caplog):
    counted = []
    with monkeypatch.context() as patch:
        write = shard_writer._write
        patch.setattr(shard_writer, "_write", lambda file, data: (counted.append(file), write(file, data)))
        run(corpus, tmp_path / "whole", trained_folder)
    whole = contents(expected)
    for call in range(0, len(counted) - 20, 17):
        out = tmp_path / str(call)
        caplog.clear()
        for later in (call, 8):     # eight writes bring a task further, even where a shard is completed first
            with monkeypatch.context() as patch, pytest.raises(Killed):
                killed_at(later, patch)
                run(corpus, out, trained_folder)
        run(corpus, out, trained_folder)
        assert contents(out) == whole, call
        done = [int(message.split()[-4]) for message in caplog.messages]
        assert done == sorted(set(done)) and len(done) >= 1 + (call > 5), "a run began before the last one stopped"


def test_the_end_of_a_run_may_be_killed_too(corpus, expected, trained_folder, tmp_path, monkeypatch, caplog):
    for name in ("replace", "unlink"):
        out = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shard_writer.os, name, lambda *_: (_ for _ in ()).throw(Killed()))
            run(corpus, out, trained_folder)
        assert (out / "progress.jsonl").exists()
        run(corpus, out, trained_folder)
        assert contents(out) == contents(expected)
    assert caplog.messages[-1] == f"{tmp_path / 'unlink'} is prepared already: nothing to do"


def test_bytes_that_the_machine_lost_are_written_again(corpus, expected, trained_folder, tmp_path, monkeypatch):
    """A file that is shorter or other than the progress says, as after a power failure."""
    for number, damage in enumerate((lambda data: data[:200], lambda data: data[:200] + bytes(8) + data[208:])):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(40, patch)
            run(corpus, out, trained_folder)
        last = sorted(path for path in out.glob("shard-*.npy") if "lengths" not in path.name)[-1]
        data = last.read_bytes()
        assert len(data) > 1000 and data[200:208] != bytes(8)
        last.write_bytes(damage(data))
        run(corpus, out, trained_folder)
        assert contents(out) == contents(expected)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from qwen2_jax.data import prepare, shard_writer, source_files, text_source
if __name__ == "__main__":
    import time
    prepare.PIECE_BYTES = text_source.PIECE_BYTES = 2000
    note = shard_writer.ShardWriter._note
    shard_writer.ShardWriter._note = lambda self, entry: (note(self, entry), time.sleep(0.003))
    prepare.prepare([{corpus!r}], {out!r}, {tokenizer!r}, workers=2, shard_tokens={shard_tokens})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on(corpus, expected, trained_folder, tmp_path, how):
    """kill -9, or Ctrl-C, at three moments of a run with workers."""
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT), corpus=str(corpus), out=str(out), tokenizer=str(trained_folder),
                                    shard_tokens=SHARD_TOKENS))
    went_on = 0
    for lines in (4, 10, 40):
        process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        progress = out / "progress.jsonl"
        before = progress.read_bytes().count(b"\n") if progress.exists() else 0
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if progress.exists() and progress.read_bytes().count(b"\n") >= before + lines:
                break
            time.sleep(0.001)
        os.killpg(process.pid, how)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (-how, 1 if how == signal.SIGINT else -how)
        went_on += "going on in" in said
        assert ("the same command goes on there" in said) == (how == signal.SIGINT)
    assert went_on == 2 and not (out / "manifest.json").exists()
    run(corpus, out, trained_folder)
    assert contents(out) == contents(expected)


def test_a_finished_folder_is_left_alone(corpus, expected, trained_folder, caplog):
    before = {path: path.stat().st_mtime_ns for path in expected.iterdir()}
    shards = run(corpus, expected, trained_folder, workers=2, max_bad_rows=7)
    assert len(shards) == 260
    assert caplog.messages == [f"{expected} is prepared already: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in expected.iterdir()} == before


@pytest.fixture
def begun(corpus, trained_folder, tmp_path, monkeypatch):
    """A corpus of its own, prepared up to somewhere in the first file."""
    own = tmp_path / "corpus"
    own.mkdir()
    for path in corpus.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(20, patch)
        run(own, tmp_path / "out", trained_folder)
    return own, tmp_path / "out"


@pytest.mark.parametrize("finished", [False, True])
def test_other_work_is_refused_with_what_differs(begun, trained_folder, qwen2_like, tmp_path, finished):
    corpus, out = begun
    if finished:
        run(corpus, out, trained_folder)
    before = contents(out)

    def refused(message: str, tokenizer: Path = trained_folder, **options):
        with pytest.raises(UserError, match=f"out was prepared from something else: {message}.*another --out$"):
            run(corpus, out, tokenizer, **options)
        assert contents(out) == before

    refused(r"text_key was 'text', is 'body'\.", options=SourceOptions(text_key="body"))
    refused(r"document was 'file', is 'line'\.", options=SourceOptions(document="line"))
    refused(r"shard_tokens was 3000, is 5000\.", shard_tokens=5000)
    refused(r"tokenizer_sha256 was '\w+', is '\w+'; .*vocab was 1024, is 300", tokenizer=qwen2_like)
    (corpus / "new.txt").write_text("x")
    refused(r"source .*new\.txt is new\.")
    (corpus / "new.txt").unlink()
    (corpus / "c03.txt").rename(tmp_path / "c03.txt")
    refused(r"source .*c03\.txt is gone\.")
    (tmp_path / "c03.txt").rename(corpus / "c03.txt")
    text = (corpus / "a.jsonl").read_bytes()
    (corpus / "a.jsonl").write_bytes(text + b"{}\n")
    refused(rf"{corpus}/a\.jsonl has changed \({len(text):,} bytes then, {len(text) + 3:,} now\)\.")
    (corpus / "a.jsonl").write_bytes(text.replace(b"the", b"The"))
    refused(r".*a\.jsonl has changed")


@pytest.fixture(scope="module")
def qwen2_like(tmp_path_factory, training_texts):
    """Another tokenizer."""
    from qwen2_jax.data.train_tokenizer import train_sentencepiece

    return train_sentencepiece(training_texts[:1], 300, tmp_path_factory.mktemp("other"))


def test_a_file_that_was_not_read_yet_may_change(begun, trained_folder, tmp_path, caplog, monkeypatch):
    corpus, out = begun
    (corpus / "c19.txt").write_text("quite another text")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shard_writer.os, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
        run(corpus, out, trained_folder)
    run(corpus, out, trained_folder)        # now it has been read, as it is now
    assert f"{corpus / 'c19.txt'} has changed" in caplog.messages[0] and "taken as it is now" in caplog.messages[0]
    run(corpus, tmp_path / "anew", trained_folder)
    assert contents(out) == contents(tmp_path / "anew")


def test_bad_rows_are_listed_and_limited(trained_folder, tmp_path, caplog):
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents_of(1, 60))
    bad = b"no json\n{\"text\": 3}\n"
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(good + bad + good + bad)
    with pytest.raises(UserError, match=r"a\.jsonl:124: 'text' is a number.*4 bad rows, and --max-bad-rows is 3"):
        run(path, tmp_path / "other", trained_folder, max_bad_rows=3)
    assert f"{path}:61: no JSON: Expecting value at character 0: skipped" in caplog.messages
    with pytest.raises(UserError, match=r"a\.jsonl:61: no JSON.*1 bad row, and --max-bad-rows is 0: mend the data"):
        run(path, out, trained_folder)
    assert not (out / "manifest.json").exists()
    for _ in range(2):      # the limit is of all runs together
        with pytest.raises(UserError, match=r"a\.jsonl:123: no JSON.*3 bad rows, and --max-bad-rows is 2"):
            run(path, out, trained_folder, max_bad_rows=2)
    run(path, out, trained_folder, max_bad_rows=4)      # a higher one goes on
    run(path, tmp_path / "other", trained_folder, max_bad_rows=4, workers=2)
    assert contents(out) == contents(tmp_path / "other")
    assert json.loads((out / "manifest.json").read_text())["skipped"] == 4
    assert len(TokenShards(out)) == 120
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [61, 62, 123, 124]
    assert rows[1] == {"file": str(path), "row": 62, "reason": "'text' is a number instead of a string"}


def test_a_damaged_file_stops_the_run_after_what_came_before(trained_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(10_000)))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-100])
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"b\.jsonl\.gz is truncated: its gzip data has no end"):
            run(tmp_path / "*.jsonl*", tmp_path / f"out{workers}", trained_folder, workers=workers)
        assert not (tmp_path / f"out{workers}" / "manifest.json").exists()


def test_folders_that_cannot_be_used(corpus, trained_folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    for out, message in (("model", r"model holds other files \(config\.json\): --out names a new folder"),
                         ("file", r"file is a file; --out names a folder")):
        with pytest.raises(UserError, match=message):
            run(corpus, tmp_path / out, trained_folder)
    with pytest.raises(UserError, match="shards are written to a local folder"):
        prepare([str(corpus)], "gs://bucket/out", trained_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the sources hold no document; 0 bad rows were skipped"):
        run(tmp_path / "empty.jsonl", tmp_path / "empty", trained_folder)


def test_two_runs_never_write_into_one_folder(corpus, trained_folder, begun):
    corpus, out = begun
    writer = shard_writer.ShardWriter(out)
    with pytest.raises(UserError, match=r"another run is writing into .*out: wait, or choose another --out"):
        run(corpus, out, trained_folder)
    writer.close()
    run(corpus, out, trained_folder)


def test_a_full_disk_is_one_sentence_and_loses_nothing(corpus, expected, trained_folder, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        calls = iter([shard_writer._write] * 30)
        patch.setattr(shard_writer, "_write", lambda file, data: next(calls, full)(file, data))
        with pytest.raises(UserError, match=r"cannot write .*out: No space left on device; free some space: the same"):
            run(corpus, tmp_path / "out", trained_folder)
    run(corpus, tmp_path / "out", trained_folder)
    assert contents(tmp_path / "out") == contents(expected)


def test_what_cannot_be_meant_is_refused(corpus, tmp_path, trained_folder):
    for options, message in (({"workers": 0}, "workers is 0; at least 1"), ({"max_bad_rows": -1}, "max_bad_rows is -1"),
                             ({"shard_tokens": 0}, "shard_tokens is 0")):
        with pytest.raises(UserError, match=message):
            run(corpus, tmp_path / "out", trained_folder, **options)
    with pytest.raises(UserError, match="document is 'page'; it is one of file, line, paragraph"):
        dataclasses.replace(SourceOptions(), document="page")
    assert not (tmp_path / "out").exists()


def test_the_environment_is_as_before(corpus, tmp_path, trained_folder, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    run(corpus / "c00.txt", tmp_path / "out", trained_folder)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with prepare_module._one_thread():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_qwen2s_own_tokenizer(qwen2_folder, qwen2, shared, tmp_path):
    """Real text, and ids that need 32 bits."""
    source = shared / "data" / "train" / "c4_en_demo.jsonl.gz"
    rows = gzip.decompress(source.read_bytes()).splitlines()[:30]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(rows))
    shards = prepare([str(tmp_path / "some.jsonl")], tmp_path / "out", qwen2_folder, workers=1)
    assert len(shards) == len(rows)
    for number in range(30):
        tokens = shards.tokens(number, 0, int(shards.lengths[number]))
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == [*qwen2.encode(json.loads(rows[number])["text"]), 151643]
