"""The quickstart end to end on a made-up library, in seconds; the real one is `make quickstart`."""

from __future__ import annotations

import dataclasses
import json
import lzma

import jax
import numpy as np
import pytest

import qwen2_jax
from experiments import quickstart as module
from experiments.library_corpus import read_library
from experiments.quickstart import PROMPTS, Settings, main, quickstart
from experiments.trigram import Trigram
from qwen2_jax.errors import UserError
from qwen2_jax.train.metrics import read_metrics
from tests.experiments.fake_library import write_library


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    library = write_library(tmp_path_factory.mktemp("library"), functions=40)
    return Settings(vocab=300, layers=1, d_model=16, d_ff=24, heads=2, kv_heads=1, row_length=32, batch=4, steps=6,
                    evaluations=3, sample_tokens=200, new_tokens=4, library=library, min_bytes=1000)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(folder, summary) of a run that was made twice into the same place."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    with jax.numpy_dtype_promotion("standard"):     # set up before the fixture of each test that does so
        quickstart(dataclasses.replace(settings, seed=1), out)
        (out / "left over").touch()
        return out, quickstart(settings, out)


def test_a_second_run_replaces_the_first(finished):
    out, summary = finished
    made = {path.name for path in out.iterdir()}
    assert made >= {"checkpoints", "hf", "tokenizer", "metrics.jsonl", "quickstart.json"}
    assert not (out / "left over").exists()
    assert [path.name for path in out.parent.iterdir()] == ["quickstart"], "a temporary folder was left"
    assert json.loads((out / "quickstart.json").read_text()) == summary


def test_the_summary_is_what_the_files_say(finished, settings):
    out, summary = finished
    corpus = read_library(settings.library, min_bytes=1)
    text = corpus.held_out_documents
    n_bytes = sum(map(len, text))
    trigram = Trigram(corpus.train_documents)
    assert summary["held_out_bytes"] == n_bytes and summary["held_out_modules"] == ["queue"]
    assert summary["trigram_bits_per_byte"] == pytest.approx(sum(map(trigram.bits, text)) / n_bytes)
    packed = lzma.compress(b"".join(text), preset=9 | lzma.PRESET_EXTREME)
    assert summary["xz_bits_per_byte"] == pytest.approx(8 * len(packed) / n_bytes)
    assert summary["saved"] == pytest.approx(1 - summary["model_bits_per_byte"] / summary["trigram_bits_per_byte"])
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == summary["train_tokens"]


@pytest.mark.parametrize("folder", ["hf", "checkpoints"])
def test_the_models_bits_follow_from_what_was_saved(finished, settings, folder):
    """Token by token from the saved model's own logits, in windows with half a row of context."""
    out, summary = finished
    lm = qwen2_jax.load(out / folder, dtype="float32")
    [text] = read_library(settings.library, min_bytes=1).held_out_documents
    end = lm.tokenizer.token_id("<|endoftext|>")
    ids = [end, *lm.tokenizer.encode(text.decode(), special=False)]
    T, bits, done = settings.row_length, 0.0, 0
    while done < len(ids) - 1:
        stop = min(len(ids) - 1, done + (T // 2 if done else T))
        start = max(0, stop - T)
        [z_TV] = lm.logits([ids[start:stop]])
        z_TV = z_TV.astype(np.float64)
        logp_TV = z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))
        bits -= sum(logp_TV[i - start, ids[i + 1]] for i in range(done, stop)) / np.log(2)
        done = stop
    assert bits / len(text) == pytest.approx(summary["model_bits_per_byte"], rel=1e-5)


def test_phases_and_completions_are_printed(settings, tmp_path, capsys):
    quickstart(settings, tmp_path / "out")
    out, err = capsys.readouterr()
    for phase in ("text", "tokenizer", "baselines", "model", "training", "held out", "export", "done"):
        assert f" s] {phase}: " in out
    assert "tokens/s" in err and "loss" in err
    for prompt in PROMPTS:
        assert prompt.splitlines()[0] in out


def test_the_same_seed_gives_the_same_numbers(finished, settings, tmp_path):
    again = quickstart(settings, tmp_path / "out")
    assert again["model_bits_per_byte"] == finished[1]["model_bits_per_byte"]


def test_another_folder_is_not_replaced(settings, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not the folder of an earlier quickstart"):
        quickstart(settings, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failure_keeps_the_earlier_run_and_leaves_nothing(finished, settings, monkeypatch):
    out, summary = finished

    def fail(*_, **__):
        raise UserError("no space")

    monkeypatch.setattr(module, "export_hf", fail)
    with pytest.raises(UserError, match="no space"):
        quickstart(settings, out)
    assert json.loads((out / "quickstart.json").read_text()) == summary
    assert [path.name for path in out.parent.iterdir()] == ["quickstart"]


def test_an_export_that_changes_the_model_is_caught(settings, tmp_path, monkeypatch):
    export = module.export_hf

    def wrong(params, *rest, **options):
        return export(params | {"norm": {"scale": params["norm"]["scale"] * 1.01}}, *rest, **options)

    monkeypatch.setattr(module, "export_hf", wrong)
    with pytest.raises(AssertionError, match="logits differ"):
        quickstart(settings, tmp_path / "out")


@pytest.mark.parametrize("saved, status", [(0.16, 0), (0.15, 0), (0.14, 1)])
def test_exit_status_says_whether_the_trigram_is_beaten(saved, status, monkeypatch):
    monkeypatch.setattr(module, "quickstart", lambda settings, out: {"saved": saved})
    assert main(["--steps", "3"]) == status


def test_user_errors_are_one_line(monkeypatch, capsys):
    def fail(settings, out):
        raise UserError("no sources")

    monkeypatch.setattr(module, "quickstart", fail)
    assert main([]) == 2
    assert capsys.readouterr().err == "quickstart: error: no sources\n"
    assert main(["--steps", "0"]) == 2
    assert "--steps must be at least 1, found 0" in capsys.readouterr().err
    for seed in ("-1", str(2**32)):     # known before a tokenizer is trained
        assert main([f"--seed={seed}"]) == 2
        assert "seed must be" in capsys.readouterr().err
