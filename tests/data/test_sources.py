"""Documents out of each kind of source, against the library that wrote the file."""

from __future__ import annotations

import gzip
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.data import text_source
from qwen2_jax.data.rows import BadRow
from qwen2_jax.data.source_files import SourceOptions, find_files
from qwen2_jax.data.sources import documents, pieces, rows
from qwen2_jax.errors import UserError

TEXTS = ["one", "naïve café 北京\n\nwith \x00 and <|endoftext|>", " spaces ", "x" * 3000, "{\"text\": 1}"]


def texts_of(*sources: object, max_bad_rows: int = 0, **options) -> list[str]:
    found = documents([str(source) for source in sources], SourceOptions(**options), max_bad_rows=max_bad_rows)
    return [document.text for document in found]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
                   ).encode()


def bad_rows(path: Path, **options) -> list[tuple[int, str]]:
    options = SourceOptions(**options)
    found = [row for piece, _ in pieces(find_files([str(path)], options), options) for row in rows(piece, options)]
    return [(row.row, row.reason) for row in found if isinstance(row, BadRow)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few bytes, so that small files have many."""
    for module in ("text_source", "parquet_source", "array_record_source"):
        monkeypatch.setattr(f"qwen2_jax.data.{module}.PIECE_BYTES", 50)
    monkeypatch.setattr("qwen2_jax.data.parquet_source.BATCH", 16)


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_json_lines(tmp_path, small_pieces, ending):
    path = tmp_path / f"naïve name.jsonl{ending}"
    path.write_bytes(COMPRESSIONS[ending](json_lines(TEXTS, "body")))
    found = list(documents([str(path)], SourceOptions(text_key="body")))
    assert [document.text for document in found] == TEXTS
    assert [(document.file, document.row) for document in found] == [(str(path), n) for n in range(1, 6)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_members_and_frames_follow_one_another(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    padding = b"\0" * 700 if ending == ".gz" else b""       # as tapes and some writers leave it
    skippable = b"" if ending == ".gz" else bytes.fromhex("502a4d18 04000000") + b"pzst"
    lines = json_lines(TEXTS)
    cut = lines.index(b"\n") - 5
    path.write_bytes(COMPRESSIONS[ending](lines[:cut]) + skippable + COMPRESSIONS[ending](lines[cut:]) + padding)
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_that_are_cut_short_or_damaged_are_refused(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESSIONS[ending](json_lines([str(i) * 50 for i in range(2000)]))
    for end in (1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=rf"a\.jsonl\{ending} is (truncated|damaged)"):
            texts_of(path)
    path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])      # in the checksum, or in the last block
    with pytest.raises(UserError, match="is damaged"):
        texts_of(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match="is damaged, or no"):
        texts_of(path)


def test_plain_text(tmp_path, small_pieces):
    text = "first line\r\nsecond\n\n \t\nthird\x00\n\n\n\n\nlast of all, naïve"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts_of(path) == [text]
    assert texts_of(path, document="line") == ["first line", "second", "third\x00", "last of all, naïve"]
    assert texts_of(path, document="paragraph") == ["first line\r\nsecond", "third\x00", "last of all, naïve"]
    found = documents([str(path)], SourceOptions(document="paragraph"))
    assert [document.row for document in found] == [1, 5, 10]


lines = st.lists(st.sampled_from(["", " ", "a", "b\r", "long " * 15, "\t\r"]), max_size=40)


@given(lines, st.sampled_from(["line", "paragraph"]), st.integers(1, 200))
def test_neither_pieces_nor_where_one_starts_anew_change_documents(tmp_path_factory, lines, unit, size):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes("\n".join(lines).encode())
    options = SourceOptions(document=unit)
    files = find_files([str(path)], options)
    with pytest.MonkeyPatch.context() as patch:
        whole = [row for piece, _ in pieces(files, options) for row in rows(piece, options)]
        patch.setattr(text_source, "PIECE_BYTES", size)
        cut = list(pieces(files, options))
        assert [row for piece, _ in cut for row in rows(piece, options)] == whole
        for k, (_, position) in enumerate(cut):
            assert list(pieces(files, options, position)) == cut[k + 1 :]


def test_expected_paragraphs(tmp_path):
    """Documents of text by the plainest rule there is: groups of lines that are not blank."""
    text = "\n\n  \na\nb\n \n\nc\n\n d\n\n"
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path, document="paragraph") == ["a\nb", "c", " d"]
    assert texts_of(tmp_path, document="line") == ["a", "b", "c", " d"]


GARBAGE = [
    (b"{\"text\": \"good\"}", None),
    (b"no json", "no JSON: Expecting value at character 0"),
    (b"{\"body\": \"x\"}", "no key 'text', only 'body'"),
    (b"{}", "no key 'text'"),
    (b"{\"text\": 7}", "'text' is a number instead of a string"),
    (b"{\"text\": null}", "'text' is null instead of a string"),
    (b"[1]", "a list instead of a JSON object"),
    (b"{\"text\": \"\xff\"}", "no UTF-8 at byte 10"),
    (b"{\"text\": \"\"}", "the text is empty"),
    (b"", "an empty line"),
    (b"{\"text\": \"\\ud800\"}", "a lone surrogate at character 0, which UTF-8 cannot write"),
    (b"\0\0\0\0", "no JSON: Expecting value at character 0"),
    (b"[" * 100_000, "no JSON: "),
    (b"1" * 5000, "no JSON: "),
    (b"{\"text\": \"also good\"}\r", None),
]


def test_bad_rows_are_told_with_file_line_and_reason(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in GARBAGE) + b"\n")
    expected = [(number, reason) for number, (_, reason) in enumerate(GARBAGE, start=1) if reason]
    found = bad_rows(path)
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, reason), (_, beginning) in zip(found, expected, strict=True):
        assert reason.startswith(beginning)
    with caplog.at_level(logging.WARNING):
        assert texts_of(path, max_bad_rows=len(expected)) == ["good", "also good"]
    assert f"{path}:4: no key 'text': skipped" in caplog.messages
    with pytest.raises(UserError, match=r"a\.jsonl:14: no JSON.*13 bad rows, and --max-bad-rows is 12"):
        texts_of(path, max_bad_rows=len(expected) - 1)


def test_bad_rows_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\ngood")
    assert bad_rows(tmp_path / "a.txt", document="line") == [(2, "no UTF-8 at byte 1")]
    assert bad_rows(tmp_path / "a.txt") == [(1, "no UTF-8 at byte 6")]
    (tmp_path / "b.txt").touch()
    assert bad_rows(tmp_path / "b.txt") == [(1, "the text is empty")]


def test_empty_files_have_no_rows_which_is_told(tmp_path, caplog):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_bytes(json_lines(["x"]))
    assert texts_of(tmp_path) == ["x"]
    assert caplog.messages == [f"{tmp_path / 'a.jsonl'} has no rows"]


def test_a_row_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "MOST_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"short\n" + b"x" * (2 << 20))
    with pytest.raises(UserError, match=r"a\.txt, row 1: more than 1 MiB in one document; cut it up, or take --doc"):
        texts_of(tmp_path)
    with pytest.raises(UserError, match=r"a\.txt, row 2: more than 1 MiB in one document; cut it up$"):
        monkeypatch.setattr(text_source, "PIECE_BYTES", 3)
        texts_of(tmp_path, document="line")


def test_a_huge_line(tmp_path):
    text = "word " * 1_000_000
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", text, "b"]))
    assert texts_of(tmp_path) == ["a", text, "b"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet(tmp_path, small_pieces, kind):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = {"string": pa.string(), "large_string": pa.large_string(), "binary": pa.binary(),
             "dictionary": pa.dictionary(pa.int32(), pa.string())}
    texts = [f"{text} {i}" for i in range(30) for text in TEXTS]
    path = tmp_path / "a.parquet"
    column = pa.array(texts, pa.binary() if kind == "binary" else pa.string()).cast(kinds[kind])
    parquet.write_table(pa.table({"n": list(range(len(texts))), "body": column}), path, row_group_size=40)
    assert texts_of(path, text_key="body") == texts
    options = SourceOptions(text_key="body")
    files = find_files([str(path)], options)
    cut = list(pieces(files, options))
    assert len(cut) > 10
    for k, (_, position) in list(enumerate(cut))[::7]:
        assert list(pieces(files, options, position)) == cut[k + 1 :]


def test_parquet_that_gives_no_texts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": [1, 2, 3, 4], "text": pa.array([b"a", None, b"\xff", b""])}), path)
    assert bad_rows(path) == [(2, "null instead of a string"), (3, "no UTF-8 at byte 0"), (4, "the text is empty")]
    with pytest.raises(UserError, match=r"a\.parquet: column 'n' holds int64, not strings"):
        texts_of(path, text_key="n")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body', only n, text; --text-key"):
        texts_of(path, text_key="body")
    whole = path.read_bytes()
    for content in (whole[:-20], whole[len(whole) // 2 :], b"", b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet is damaged, or no Parquet file"):
            texts_of(path)


def write_array_record(path: Path, records: list[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record(tmp_path, small_pieces):
    path = tmp_path / "a.array_record"
    texts = TEXTS * 20
    write_array_record(path, json_lines(texts).splitlines())
    assert texts_of(path) == texts
    write_array_record(path, [text.encode() for text in texts])
    assert texts_of(path, records="text") == texts
    with pytest.raises(UserError, match=r"a\.array_record:1: no JSON"):
        texts_of(path)
    write_array_record(path, [])
    assert texts_of(path) == []


def test_array_record_of_examples(tmp_path):
    from tensorflow_datasets.proto import tf_example_generated_pb2

    records = []
    for text in TEXTS:
        example = tf_example_generated_pb2.Example()
        example.features.feature["text"].bytes_list.value.append(text.encode())
        example.features.feature["n"].int64_list.value.append(3)
        records.append(example.SerializeToString())
    path = tmp_path / "a.array_record"
    write_array_record(path, [*records, b"\xff\xff", b""])
    assert texts_of(path, records="example", max_bad_rows=2) == TEXTS
    assert bad_rows(path, records="example") == [(6, "no tf.train.Example"), (7, "no feature 'text', only ")]
    assert bad_rows(path, records="example", text_key="n")[0] == (1, "feature 'n' holds 0 strings instead of one")


def test_a_damaged_array_record_file_is_refused(tmp_path):
    whole = tmp_path / "a.array_record"
    write_array_record(whole, json_lines(TEXTS * 200).splitlines())
    data = whole.read_bytes()
    for number, content in enumerate((data[:-1000], b"", b"something else", data[:70_000] + b"?" + data[70_001:])):
        path = tmp_path / f"{number}.array_record"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{number}\.array_record is damaged, or no ArrayRecord file"):
            texts_of(path)


def test_folders_and_globs(tmp_path, caplog):
    (tmp_path / "data set" / "b").mkdir(parents=True)
    folder = tmp_path / "data set"
    for name in ("b/2.jsonl", "b/10.json", "a.ndjson", ".hidden.jsonl", "[c].jsonl"):
        (folder / name).write_bytes(json_lines([name]))
    (folder / "README").write_text("not data")
    (folder / "loop").symlink_to(folder)
    names = ["[c].jsonl", "a.ndjson", "b/10.json", "b/2.jsonl"]
    assert texts_of(folder) == names
    assert caplog.messages == [f"{folder}: 1 without a known ending passed over (README)"]
    assert texts_of(folder / "*.jsonl") == ["[c].jsonl"]
    assert texts_of(folder / "b" / "*.js*") == ["b/10.json", "b/2.jsonl"]
    assert texts_of(folder / "[c].jsonl", folder / "a.ndjson") == ["[c].jsonl", "a.ndjson"]
    assert texts_of(folder / "README", format="text") == ["not data"]


@pytest.mark.parametrize(("name", "message"), [
    ("missing.jsonl", r"missing\.jsonl does not exist"),
    ("*.jsonlx", r"no file matches .*\*\.jsonlx"),
    ("a.csv", r"a\.csv: the ending tells no format; known are \.jsonl.*--format names it"),
    ("a.tfrecord-00000-of-00001", r"a\.tfrecord: TFRecord files are read by TensorFlow only.*--file_format=array"),
    ("a.parquet.gz", r"parquet files are compressed inside; undo the gzip"),
    ("empty", r"empty holds no file with a known ending"),
    ("/dev/null", r"/dev/null is neither a file nor a folder"),
])
def test_sources_that_cannot_be_read(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    for there in ("a.csv", "a.tfrecord-00000-of-00001", "a.parquet.gz"):
        (tmp_path / there).touch()
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name)


def test_a_file_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x"]))
    with pytest.raises(UserError, match=r"a\.jsonl is named twice"):
        texts_of(tmp_path / "a.jsonl", tmp_path / "*.jsonl")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, small_pieces):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    found = documents([str(path)], SourceOptions())
    next(found)
    with path.open("ab") as stream:
        stream.write(json_lines(["late"]))
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was being prepared"):
        list(found)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf'files need the package {package}: pip install "qwen2_jax\[data\]"$'):
            texts_of(tmp_path / name)


@pytest.fixture
def bucket(monkeypatch):
    """A file system in memory where `gs://` paths lead, in gcsfs's place."""
    fsspec = pytest.importorskip("fsspec")
    from etils.epath import backend

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(memory, "pseudo_dirs", [""])
    monkeypatch.setattr(type(memory), "_strip_protocol", classmethod(
        lambda cls, path: "/" + str(path).removeprefix("memory://").removeprefix("gs://").strip("/")))
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: memory)
    return memory


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_google_storage(bucket, small_pieces, ending):
    for number, text in enumerate(TEXTS):
        bucket.pipe(f"/bucket/corpus/{number}.jsonl{ending}", COMPRESSIONS[ending](json_lines([text] * 2)))
    twice = [text for text in TEXTS for _ in range(2)]
    assert texts_of("gs://bucket/corpus") == twice
    assert texts_of("gs://bucket/corpus/[12].jsonl*") == twice[2:6]
    found = list(documents([f"gs://bucket/corpus/0.jsonl{ending}"], SourceOptions()))
    assert [(document.file, document.row) for document in found] == [(f"gs://bucket/corpus/0.jsonl{ending}", 1),
                                                                    (f"gs://bucket/corpus/0.jsonl{ending}", 2)]
    with pytest.raises(UserError, match="gs://bucket/none does not exist"):
        texts_of("gs://bucket/none")


def test_parquet_in_google_storage(bucket):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(pa.table({"text": TEXTS}), stream)
    bucket.pipe("/bucket/a.parquet", stream.getvalue())
    assert texts_of("gs://bucket/a.parquet") == TEXTS
    bucket.pipe("/bucket/a.array_record", b"")
    with pytest.raises(UserError, match=r"gs://bucket/a\.array_record: ArrayRecord is read from local files only"):
        texts_of("gs://bucket/a.array_record")


def test_google_storage_without_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match=r'^gs:// paths need the package gcsfs: pip install "qwen2_jax\[data\]"$'):
        texts_of("gs://bucket/a.jsonl")
