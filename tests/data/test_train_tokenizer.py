"""A trained tokenizer: every text comes back, three readers give the same ids, the same texts give the same files."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings

from qwen2_jax.data.chat import render_chat
from qwen2_jax.data.export_tokenizer import MESSAGES, PIECE, export_tokenizer_json, parse_model, tokenizer_json
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.train_tokenizer import train_sentencepiece
from qwen2_jax.errors import UserError
from tests.data.conftest import VOCAB, library_sources
from tests.data.texts import any_text, plain

HELD_OUT = (
    "_pydecimal", "_pyio", "calendar", "codecs", "configparser", "datetime", "difflib", "doctest", "enum", "fractions",
    "ftplib", "functools", "gettext", "heapq", "imaplib", "ipaddress", "locale", "mailbox", "optparse", "pdb", "pickle",
    "platform", "plistlib", "pydoc", "random", "shutil", "smtplib", "socket", "ssl", "statistics", "tarfile",
    "tempfile", "threading", "tokenize", "traceback", "turtle", "typing", "uuid", "weakref", "zipfile/__init__",
)
FILES = {
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenization_as_stored.py",
}


@pytest.fixture(scope="module")
def processor(trained_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained_folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    """More than a megabyte of source text, and what source text lacks."""
    names = [name for name in HELD_OUT if sys.version_info >= (3, 12) or name != "zipfile/__init__"]
    texts = library_sources(*names)
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    return [*texts, "".join(map(chr, range(0x500))), "\t" * 300 + " " * 300 + "\n" * 300 + "🎉" * 300 + "北" * 300]


def test_ids_equal_sentencepiece_on_held_out_text(trained, processor, held_out):
    ids = trained.encode_batch(held_out)
    assert ids == processor.encode(held_out)
    for text, row in zip(held_out, ids, strict=True):
        assert trained.decode(row) == text == processor.decode(row)


@settings(deadline=None, max_examples=400)
@given(any_text)
def test_ids_equal_sentencepiece_on_any_text(trained, processor, text):
    ids = trained.encode(text)
    assert ids == processor.encode(text)
    assert trained.decode(ids) == text == processor.decode(ids)


@settings(deadline=None)
@given(plain)
def test_untrusted_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text, special=False)) == text


@pytest.mark.parity
@pytest.mark.parametrize("model_type", [None, "qwen2", "qwen2_moe"])
@pytest.mark.parametrize("trust", [None, True])
def test_auto_tokenizer_gives_the_same_ids(
    trained, trained_folder, training_texts, held_out, tmp_path, monkeypatch, model_type, trust
):
    """Also beside the config.json of a Qwen2 model, for which transformers has a pipeline of its own."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in trained_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
    texts = [*held_out[-8:], training_texts[-1], "<|im_start|>user\n<|im_end|>", "\x00\x1b\x7f e\u0301 ▁"]
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (3, 1, VOCAB)
    turns = (("user", "hi\n"), ("assistant", "ho"), ("user", "?"))
    chat = [{"role": role, "content": content} for role, content in turns]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == render_chat(chat, template=None)
    assert theirs.apply_chat_template(chat[:2], tokenize=False) == render_chat(
        chat[:2], template=None, add_generation_prompt=False
    )


def test_layout_of_the_vocabulary(trained, trained_folder, processor):
    assert trained.vocab_size == processor.get_piece_size() == VOCAB
    first = [processor.id_to_piece(i) for i in range(5)]
    assert first == ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<0x00>"]
    assert [trained.id_to_bytes(4 + b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert trained.decode([0]) == processor.decode([0]) == "<unk>"
    assert {file.name for file in trained_folder.iterdir()} == FILES


def test_lines_of_code_become_few_tokens(trained):
    """The end of a line and the indentation of the next are one piece, which sentencepiece alone does not learn."""
    assert len(trained.encode("\n        ")) == 1
    assert len(trained.encode(":\n        return self")) <= 3


def test_the_model_file_alone_is_enough(trained, trained_folder, tmp_path, training_texts):
    (tmp_path / "tokenizer.model").write_bytes((trained_folder / "tokenizer.model").read_bytes())
    alone = Tokenizer.load(tmp_path)
    assert alone.encode(training_texts[0]) == trained.encode(training_texts[0])
    assert (alone.vocab_size, alone.special_ids) == (trained.vocab_size, trained.special_ids)
    export_tokenizer_json(tmp_path / "tokenizer.model", tmp_path / "out")
    for name in FILES - {"tokenizer.model"}:
        assert (tmp_path / "out" / name).read_bytes() == (trained_folder / name).read_bytes()


def test_same_texts_same_files_in_another_process(tmp_path):
    """Whatever order Python's sets and dictionaries of strings hash to."""
    program = (
        "import sys; from qwen2_jax.data.train_tokenizer import train_sentencepiece\n"
        "train_sentencepiece(['the cat sat on the mat\\n' * 9, 'naïve 猫 cat'], 290, sys.argv[1])"
    )
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": "."}
        subprocess.run([sys.executable, "-c", program, tmp_path / seed], check=True, env=env)
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_export_of_any_vocabulary_on_all_short_strings():
    """Scores in no natural order, pieces that no merge reaches: every string of two letters up to nine long."""
    strings = ["".join(letters) for n in range(2, 6) for letters in itertools.product("ab", repeat=n)]
    texts = ["".join(letters) for n in range(10) for letters in itertools.product("ab", repeat=n)]
    for seed in range(12):
        pieces = random.Random(seed).sample(strings, 5 + 2 * seed)
        model = parse_model(b"")
        model.trainer_spec.model_type = MESSAGES.TrainerSpec.BPE
        model.trainer_spec.byte_fallback = True
        spec = model.normalizer_spec
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = False
        model.pieces.add(piece="<unk>", type=PIECE.UNKNOWN)
        for b in range(256):
            model.pieces.add(piece=f"<0x{b:02X}>", type=PIECE.BYTE)
        for rank, piece in enumerate([*pieces, "a", "b"]):
            model.pieces.add(piece=piece, score=-rank)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        ours = tokenizers.Tokenizer.from_str(tokenizer_json(model))
        assert [encoding.ids for encoding in ours.encode_batch(texts)] == theirs.encode(texts)


def test_rare_characters_go_by_bytes_and_hurt_nothing(tmp_path):
    """More different characters than the vocabulary has room for."""
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 2000))) + "\x00▁▅\t a b a b" * 50]
    folder = train_sentencepiece(texts, 300, tmp_path / "out")
    ours = Tokenizer.load(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = ours.encode(texts[0])
    assert ours.vocab_size == 300 and ids == theirs.encode(texts[0])
    assert ours.decode(ids) == theirs.decode(ids) == texts[0]


def test_order_of_texts_does_not_matter(trained_folder, training_texts, tmp_path):
    folder = train_sentencepiece(reversed(training_texts), VOCAB, tmp_path / "out")
    assert (folder / "tokenizer.model").read_bytes() == (trained_folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "said"),
    [
        (["abc"], 260, "vocab_size 260 is too small"),
        (["abc"], 4096, "too little to learn vocab_size 4096: they give"),
        ([], 300, "no text to train"),
        (["", ""], 300, "no text to train"),
        (["a", "b\ud800"], 300, "text 1 holds a lone surrogate at character 1"),
    ],
)
def test_bad_training_input_is_refused_and_leaves_nothing(tmp_path, texts, vocab_size, said):
    with pytest.raises(UserError, match=said):
        train_sentencepiece(texts, vocab_size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_in_place_is_kept_unless_asked(tmp_path):
    texts = ["the cat sat on the mat " * 20]
    folder = train_sentencepiece(texts, 270, tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=r"tokenizer.model exists"):
        train_sentencepiece(texts, 275, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.json exists"):
        export_tokenizer_json(tmp_path / "tokenizer.model", tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    train_sentencepiece(texts, 275, tmp_path, overwrite=True)
    assert Tokenizer.load(tmp_path).vocab_size == 275


def test_other_sentencepiece_models_are_refused(trained_folder, tmp_path):
    for content, said in ((b"no model", "is not a sentencepiece model"), (b"", "model_type must be BPE")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=said):
            Tokenizer.load(tmp_path)
    damaged = (trained_folder / "tokenizer.model").read_bytes()
    for piece, other in ((b"<0x7F>", b"<0x7E>"), (b"<0x7F>", b"<0x7\xff>"), (b"<0x7F>", b"<byte>")):
        (tmp_path / "tokenizer.model").write_bytes(damaged.replace(piece, other))
        with pytest.raises(UserError, match="is damaged: it must hold the 256 byte pieces"):
            Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        export_tokenizer_json(tmp_path / "absent.model", tmp_path)
