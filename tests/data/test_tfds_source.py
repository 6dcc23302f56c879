"""A TFDS builder of our own, prepared as ArrayRecord, read by name and by folder; never with TensorFlow."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from qwen2_jax.data.source_files import SourceOptions, find_files
from qwen2_jax.data.sources import documents, pieces, rows
from qwen2_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

TEXTS = [f"document {i}: naïve <|endoftext|>" * (i + 1) for i in range(20)]


class OurText(tfds.core.GeneratorBasedBuilder):
    __module__ = "our_text"     # TFDS would look for files beside a module of a package
    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {"body": tfds.features.Text(), "n": tfds.features.Scalar(dtype=np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:3])}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"body": text, "n": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    OurText(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def texts_of(source, **options):
    return [document.text for document in documents([str(source)], SourceOptions(text_key="body", **options))]


def test_by_name_as_tfds_reads_it(data_dir):
    theirs = [example["body"].decode() for example in tfds.data_source("our_text", split="train", data_dir=data_dir,
                                                                       download=False)]
    assert sorted(theirs) == sorted(TEXTS)
    assert texts_of("tfds:our_text", tfds_dir=str(data_dir)) == theirs
    assert texts_of("tfds:our_text:1.2.3", tfds_dir=str(data_dir), split="train[25%:50%]") == theirs[5:10]
    assert sorted(texts_of("tfds:our_text", tfds_dir=str(data_dir), split="test")) == sorted(TEXTS[:3])
    assert "tensorflow" not in sys.modules


def test_by_folder(data_dir):
    whole = texts_of("tfds:our_text", tfds_dir=str(data_dir))
    assert texts_of(data_dir / "our_text" / "1.2.3") == whole
    assert texts_of(data_dir) == whole      # found in a folder above it


def test_pieces_start_anywhere(data_dir, monkeypatch):
    monkeypatch.setattr("qwen2_jax.data.array_record_source.PIECE_BYTES", 10_000)
    options = SourceOptions(text_key="body", tfds_dir=str(data_dir))
    files = find_files(["tfds:our_text"], options)
    cut = list(pieces(files, options))
    assert len(cut) > 2
    assert list(pieces(files, options, cut[1][1])) == cut[2:]
    assert [row.row for piece, _ in cut for row in rows(piece, options)] == list(range(1, 21))


def test_refusals(data_dir, tmp_path):
    with pytest.raises(UserError, match="tfds:our_text has no feature 'text', only body, n; --text-key"):
        list(documents(["tfds:our_text"], SourceOptions(tfds_dir=str(data_dir))))
    with pytest.raises(UserError, match="tfds:our_text, split dev: Unknown split 'dev'"):
        texts_of("tfds:our_text", tfds_dir=str(data_dir), split="dev")
    with pytest.raises(UserError, match=r"tfds:no_such_set, split train: Dataset no_such_set not found\.$"):
        texts_of("tfds:no_such_set", tfds_dir=str(data_dir))
    with pytest.raises(UserError, match="tfds:our_text:1: int instead of a string"):
        list(documents(["tfds:our_text"], SourceOptions(text_key="n", tfds_dir=str(data_dir))))
    shutil.copytree(data_dir / "our_text" / "1.2.3", tmp_path / "our_text" / "1.2.3")
    (tmp_path / "our_text" / "1.2.3" / "our_text-train.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"1\.2\.3"):
        texts_of(tmp_path)


def test_a_folder_prepared_as_tfrecord_is_explained(data_dir, tmp_path):
    folder = tmp_path / "our_text" / "1.2.3"
    shutil.copytree(data_dir / "our_text" / "1.2.3", folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for path in folder.glob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    for source, options in ((folder, {}), ("tfds:our_text", {"tfds_dir": str(tmp_path)})):
        with pytest.raises(UserError, match=r"is not prepared as ArrayRecord.*TFRecord.*tfds build NAME --file_format"):
            texts_of(source, **options)
