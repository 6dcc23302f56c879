"""Whatever happens to a file of a step is seen, and named."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.checkpoint.digests import (
    DIGESTS,
    Record,
    damages,
    digest_files,
    file_names,
    read_record,
    set_metric,
    write_record,
)
from qwen2_jax.errors import UserError

FILES = {"params/d/abc": b"weights" * 1000, "params/manifest.ocdbt": b"\0\1", "optimizer/_METADATA": b"{}",
         "about/metadata": b"", "_CHECKPOINT_METADATA": b"{}"}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "7" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "7" / name).write_bytes(data)
    write_record(tmp_path / "7", Record(7, digest_files(tmp_path / "7", file_names(tmp_path / "7"))))
    return tmp_path / "7"


def test_holds_what_sha256_says(folder):
    assert read_record(folder).files == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    assert json.loads((folder / DIGESTS).read_text())["step"] == 7
    assert damages(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_a_change_is_named(folder, name):
    file, data = folder / name, FILES[name]
    for bit in {0, 8 * len(data) // 2, 8 * len(data) - 1} if data else ():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert damages(folder) == [f"{name} is not what was written (its SHA-256 differs)"]
    file.write_bytes(data + b"x")
    assert damages(folder) == [f"{name} has {len(data) + 1:,} bytes, {len(data):,} were written"]
    if data:
        file.write_bytes(data[:-1])
        assert damages(folder) == [f"{name} has {len(data) - 1:,} bytes, {len(data):,} were written"]
    file.unlink()
    assert damages(folder) == [f"{name} is missing"]
    file.mkdir()
    assert damages(folder) == [f"{name} cannot be read (Is a directory)"]


def test_each_bit_of_the_digests_themselves_counts(folder):
    write_record(folder, Record(7, {"a": (1, "0f")}, 0.5))
    data = (folder / DIGESTS).read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / DIGESTS).write_bytes(changed)
        with pytest.raises(UserError, match=r"7/digests.json is damaged"):
            read_record(folder)
    assert damages(folder) == ["digests.json is damaged"]
    for changed in (b"", data[:-1], data + b"\n", b"[]", b"null", b'{"files": []}', b"[" * 100_000):
        (folder / DIGESTS).write_bytes(changed)
        assert damages(folder) == ["digests.json is damaged"]
    (folder / DIGESTS).unlink()
    assert damages(folder) == ["digests.json is missing"]
    with pytest.raises(UserError, match=r"7/digests.json cannot be read: No such file"):
        read_record(folder)


def test_files_put_among_an_entrys_count_and_others_do_not(folder):
    (folder / "config.json").write_text("{}")       # makes a step folder stand alone
    assert damages(folder) == []
    (folder / "params/d/more").write_bytes(b"")
    assert damages(folder) == ["params/d/more was not there when it was written"]
    assert damages(folder, ("optimizer",)) == []


def test_of_another_step(folder):
    moved = folder.rename(folder.with_name("8"))
    assert damages(moved) == ["digests.json is of step 7"]
    assert damages(moved.rename(folder.with_name("best"))) == []


def test_only_the_entries_wanted_are_looked_at(folder):
    for name in FILES:
        (folder / name).write_bytes(b"x")
    assert {text.partition(" ")[0] for text in damages(folder, ("params",))} == {
        "params/d/abc", "params/manifest.ocdbt", "_CHECKPOINT_METADATA"}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_the_whole_once(folder, count):
    for name in FILES:
        (folder / name).unlink()
    found = [text for i in range(count) for text in damages(folder, share=(i, count))]
    assert sorted(found) == sorted(f"{name} is missing" for name in FILES)


def test_a_metric_is_noted_later(folder):
    set_metric(folder, 0.1)
    assert read_record(folder).metric == 0.1 and damages(folder) == []
    set_metric(folder, math.inf)
    assert read_record(folder).metric == math.inf and file_names(folder) == sorted(FILES)
    (folder / DIGESTS).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"digests\.json is damaged"):
        set_metric(folder, 0.2)


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(0), st.text())), st.integers(0),
       st.none() | st.floats(allow_nan=False))
def test_reads_back_what_is_written(tmp_path_factory, files, step, metric):
    folder = tmp_path_factory.getbasetemp()
    record = Record(step, files, metric)
    write_record(folder, record)
    assert read_record(folder) == record
