"""Folders written here by numpy alone, as the format says, read back; and every way in which one can be broken."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.data.shards import TokenShards
from qwen2_jax.errors import UserError

pytestmark = pytest.mark.smoke


def write(folder: Path, shards: list[list[list[int]]], vocab: int) -> Path:
    """A folder with these documents of each shard."""
    folder.mkdir()
    entries = []
    for number, documents in enumerate(shards):
        names = f"shard-{number:05d}.npy", f"shard-{number:05d}.lengths.npy"
        np.save(folder / names[0], np.concatenate(documents).astype(np.uint16 if vocab <= 65536 else np.uint32))
        np.save(folder / names[1], np.array([len(document) for document in documents], np.uint32))
        sha256 = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
        entries.append({"file": names[0], "documents": len(documents), "tokens": sum(map(len, documents)),
                        "sha256": sha256[0], "lengths_file": names[1], "lengths_sha256": sha256[1]})
    manifest = {"format": 1, "shards": entries, "tokenizer_sha256": "ab", "end_token": 0, "vocab": vocab, "skipped": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def change(folder: Path, **fields) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


SHARDS = [[[5, 6, 0], [0], [7, 0]], [[1, 2, 3, 4, 0]], [[9, 0], [8, 8, 0]]]
DOCUMENTS = [document for shard in SHARDS for document in shard]


@pytest.fixture(params=[100, 65536, 65537, 151936])
def folder(request, tmp_path) -> Path:
    return write(tmp_path / "data", SHARDS, request.param)


def test_documents_by_number(folder):
    shards = TokenShards(folder)
    assert len(shards) == 6 and shards.end_token == 0
    assert (shards.lengths.dtype, shards.lengths.tolist()) == (np.uint32, [3, 1, 2, 5, 2, 3])
    for number, document in enumerate(DOCUMENTS):
        for start in range(len(document) + 1):
            for stop in range(start, len(document) + 1):
                found = shards.tokens(number, start, stop)
                assert found.dtype == (np.uint16 if shards.vocab <= 65536 else np.uint32)
                assert found.tolist() == document[start:stop]
                assert not found.flags.writeable
    assert shards.summary() == f"{folder}: 6 documents, 16 tokens, 3 shards, 0 bad rows skipped"


@pytest.mark.parametrize("asked", [(6, 0, 1), (-1, 0, 1), (0, 0, 4), (0, -1, 2), (0, 2, 1)])
def test_what_is_not_there_is_an_index_error(folder, asked):
    with pytest.raises(IndexError):
        TokenShards(folder).tokens(*asked)


def test_a_pickled_copy_is_small_and_reads_the_same(folder):
    shards = TokenShards(folder)
    assert shards.tokens(3, 1, 3).tolist() == [2, 3]
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert pickle.loads(pickled).tokens(3, 1, 3).tolist() == [2, 3]
    change(folder, end_token=1)
    with pytest.raises(UserError, match="was prepared anew meanwhile"):
        pickle.loads(pickled)


def test_the_hash_is_of_the_content(tmp_path):
    folder = write(tmp_path / "a", SHARDS, 100)
    known = TokenShards(folder).manifest_hash
    shutil.copytree(folder, tmp_path / "elsewhere")
    change(tmp_path / "elsewhere", skipped=3, sources=["other"])
    assert TokenShards(tmp_path / "elsewhere").manifest_hash == known
    others = [write(tmp_path / "b", [SHARDS[1], SHARDS[0], SHARDS[2]], 100),
              write(tmp_path / "c", [[[5, 6, 0], [0, 7], [0]], *SHARDS[1:]], 100),
              write(tmp_path / "d", [[[5, 7, 0], [0], [7, 0]], *SHARDS[1:]], 100),
              *(write(tmp_path / name, SHARDS, vocab) for name, vocab in (("e", 100), ("f", 101), ("g", 100)))]
    change(others[3], tokenizer_sha256="cd")
    change(others[5], end_token=5)
    hashes = {TokenShards(other).manifest_hash for other in others}
    assert len(hashes) == 6 and known not in hashes
    assert len(known) == 64 and int(known, 16)


def test_verify_names_what_differs(folder):
    shards = TokenShards(folder)
    shards.verify()
    for name in ("shard-00001.npy", "shard-00002.lengths.npy"):
        data = bytearray((folder / name).read_bytes())
        data[-4] ^= 1
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"data: shard-00001\.npy, shard-00002\.lengths\.npy changed since man"):
        TokenShards(folder).verify()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"holds no prepared data: there is no manifest\.json; `qwen2-jax data"):
        TokenShards(tmp_path)
    (tmp_path / "progress.jsonl").touch()
    with pytest.raises(UserError, match=r"is not complete: there is no manifest\.json"):
        TokenShards(tmp_path)
    for text, message in (("{", r"manifest\.json is damaged"), ("[]", "is not a manifest"), ("{}", "is not a manifest"),
                          ('{"shards": [], "format": 2}', "has format 2; this version reads format 1"),
                          ('{"shards": [], "format": 1}', "damaged: vocab is missing")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            TokenShards(tmp_path)


def test_files_that_are_missing_cut_short_or_others(folder):
    path = folder / "shard-00001.npy"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.npy is missing: copy it"):
        TokenShards(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"00001\.npy has {len(data) - 1} bytes where manifest\.json says {len(data)}"):
        TokenShards(folder)
    path.write_bytes(b"x" * len(data))
    with pytest.raises(UserError, match=r"cannot read .*shard-00001\.npy"):
        TokenShards(folder).tokens(3, 0, 1)
    other = np.load(folder / "shard-00000.npy").dtype.newbyteorder(">")
    np.save(path, np.array(SHARDS[1][0], other))
    with pytest.raises(UserError, match=r"shard-00001\.npy holds >u. \[5\] where manifest\.json says uint"):
        TokenShards(folder).tokens(3, 0, 1)
    np.save(folder / "shard-00000.lengths.npy", np.array([3, 1, 1], np.uint32))
    with pytest.raises(UserError, match=r"shard-00000\.lengths\.npy: the lengths do not add up to the 6 tokens"):
        len(TokenShards(folder).lengths)
