"""Train a small Qwen2 on the Python standard library, export it, and let it speak: `make quickstart`.

    python -m experiments.quickstart [--steps N] [--out FOLDER] [--seed N]

Two CPU cores, no download: the text is the interpreter's own library. Takes 118 s and ends at 1.755 bits per byte,
31.6 % below the byte trigram's 2.565 (Python 3.11.7, AMD EPYC with AVX-512, two cores with nothing else to do, commit
a8ffa13, 2026-11-22); with 1,600 steps and other work on both cores 320 s, 1.681 bits per byte.

Bits per byte, for the model and the trigram alike: -log2 P over every byte of every held-out file, each file on its
own, told where it starts and not where it ends. The model predicts tokens; the probability of one tokenization is a
lower bound on that of its bytes, so the model's figure is, if anything, too high.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import lzma
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen2_jax
from experiments.library_corpus import MIN_BYTES, Corpus, read_library
from experiments.loss_curve import draw_loss_curve
from experiments.trigram import Trigram
from qwen2_jax.checkpoint.export import export_hf
from qwen2_jax.checkpoint.files import write_model_files
from qwen2_jax.checkpoint.staging import staged
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.cli.compilation_cache import enable_compilation_cache
from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.data.chatml import END_OF_TEXT, IM_END
from qwen2_jax.data.packing import PackedDocuments
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.train_tokenizer import train_sentencepiece
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import Decoder, init_params
from qwen2_jax.ops.vocab import logits
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.serve.defaults import check_seed
from qwen2_jax.train.evaluate import Evaluate, make_evaluation
from qwen2_jax.train.loop import fit
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.metrics import MetricsFile, Progress, bits_per_byte, read_metrics
from qwen2_jax.train.resume import SaveState
from qwen2_jax.train.step import init_state, make_step

PROMPTS = ("def fibonacci(", "import os\nimport", "class Stack:\n    def __init__(self", "for line in")
MUST_SAVE = 0.15
"""Share of the trigram's bits per byte that the model must do without."""
LOGIT_TOLERANCE = 1e-4
"""The same float32 weights in another program: sums in another order, on logits of size about 10."""
SUMMARY = "quickstart.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    vocab: int = 2048
    layers: int = 2
    d_model: int = 256
    d_ff: int = 704
    heads: int = 4
    kv_heads: int = 2
    row_length: int = 256
    batch: int = 4
    steps: int = 1200
    peak: float = 3e-3
    seed: int = 0
    evaluations: int = 6
    sample_tokens: int = 8_000
    """Held-out tokens that are scored during training; at the end all are."""
    new_tokens: int = 48
    library: Path | None = None
    min_bytes: int = MIN_BYTES

    def model(self, tokenizer: Tokenizer) -> ModelConfig:
        end, turn_end = (_id(tokenizer, token) for token in (END_OF_TEXT, IM_END))
        return ModelConfig(
            vocab=self.vocab, layers=self.layers, d_model=self.d_model, d_ff=self.d_ff, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.d_model // self.heads, tied=True, norm_eps=1e-6,
            rope=RopeConfig(theta=1e4), max_position=self.row_length, init_std=0.06, eos_ids=(end, turn_end),
            pad_id=end, dtype="float32")

    def optimizer(self) -> AdamWConfig:
        return AdamWConfig(peak=self.peak, steps=self.steps, warmup=min(self.steps, max(1, self.steps // 20)),
                           schedule="linear", final=0.0, b2=0.95, weight_decay=0.1)


@dataclass
class Report:
    """Phases with their seconds on stdout, and what was measured."""

    began: float = field(default_factory=time.perf_counter)
    values: dict[str, Any] = field(default_factory=dict)

    def say(self, phase: str, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f} s] {phase}: {text}", flush=True)


def quickstart(settings: Settings, out: Path) -> dict[str, Any]:
    """Run everything into `out`, which appears whole or not at all and replaces an earlier run's; the summary."""
    out = out.absolute()
    _check_replaceable(out)
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)    # of a run that was killed between its last two renames
    report = Report()
    with staged(fresh) as folder:
        corpus, tokenizer, documents = _prepare(settings, folder, report)
        _measure_baselines(corpus, report)
        cfg, params = _train(settings, folder, corpus, tokenizer, documents, report)
        _export(settings, folder, cfg, params, documents["held out"], report)
        del params
        _finish(folder, report)
    _replace(out, fresh)
    report.say("done", f"everything lies in {out}/: checkpoints (Orbax), hf (Hugging Face), loss.png, metrics.jsonl")
    return report.values


def _prepare(settings: Settings, folder: Path, report: Report) -> tuple[Corpus, Tokenizer, dict[str, list[np.ndarray]]]:
    corpus = read_library(settings.library, min_bytes=settings.min_bytes)
    sides = {"train": corpus.train_documents, "held out": corpus.held_out_documents}
    sizes = {name: sum(map(len, texts)) for name, texts in sides.items()}
    report.say("text", f"{sizes['train']:,} bytes of the Python library to train on, {sizes['held out']:,} held out "
               f"(modules {', '.join(corpus.held_out)}), {corpus.duplicates} near-duplicate files left out")
    train_sentencepiece((text.decode() for text in sides["train"]), settings.vocab, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    end = _id(tokenizer, END_OF_TEXT)
    # The same token ends a document and stands before the next, so that each document's first token is predicted too.
    encoded = {}
    for name, texts in sides.items():
        ids = tokenizer.encode_batch([text.decode() for text in texts], special=False)
        encoded[name] = [np.array([end, *document, *([end] if name == "train" else [])]) for document in ids]
    tokens = sum(len(document) - 1 for document in encoded["held out"])
    report.values |= {"train_bytes": sizes["train"], "held_out_bytes": sizes["held out"],
                      "held_out_modules": list(corpus.held_out), "held_out_tokens": tokens}
    report.say("tokenizer", f"{settings.vocab:,} tokens, {sizes['held out'] / tokens:.2f} bytes a held-out token")
    return corpus, tokenizer, encoded


def _measure_baselines(corpus: Corpus, report: Report) -> None:
    texts = corpus.held_out_documents
    n_bytes = sum(map(len, texts))
    trigram = Trigram(corpus.train_documents)
    compressed = lzma.compress(b"".join(texts), preset=9 | lzma.PRESET_EXTREME)
    report.values |= {"trigram_bits_per_byte": sum(map(trigram.bits, texts)) / n_bytes,
                      "xz_bits_per_byte": 8 * len(compressed) / n_bytes}
    report.say("baselines", f"byte trigram {report.values['trigram_bits_per_byte']:.3f} bits per byte, "
               f"xz -9e {report.values['xz_bits_per_byte']:.3f} (on the held-out text alone, all files in one stream)")


def _train(settings: Settings, folder: Path, corpus: Corpus, tokenizer: Tokenizer,
           documents: dict[str, list[np.ndarray]], report: Report) -> tuple[ModelConfig, dict]:
    cfg, optim = settings.model(tokenizer), settings.optimizer()
    on_cpu = jax.default_backend() == "cpu"
    loss = NextTokenLoss(model=cfg, dtype="float32" if on_cpu else "bfloat16", stacked=not on_cpu)
    optimizer = make_optimizer(optim)
    state = init_state(init_params(cfg, jax.random.key(settings.seed), stacked=not on_cpu), optimizer)
    rows = PackedDocuments(documents["train"], settings.row_length)
    batches = (rows.batch(n, settings.batch, seed=settings.seed) for n in range(settings.steps))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    report.say("model", f"{parameters:,} parameters; {settings.steps} steps of {settings.batch} x "
               f"{settings.row_length} tokens, {settings.steps * settings.batch / len(rows):.2f} epochs")

    evaluation = functools.partial(make_evaluation, loss, row_length=settings.row_length,
                                   stride=settings.row_length // 2, batch_size=16)
    sample, sample_bytes = _sample(documents["held out"], corpus.held_out_documents, settings.sample_tokens)
    curve: dict[int, float] = {}

    def note(step: int, result: tuple[float, int]) -> None:
        curve[step] = bits_per_byte(result[0], sample_bytes)

    store = Store(folder / "checkpoints", keep=1)
    began = time.perf_counter()
    state, _ = fit(state, make_step(loss, optimizer, schedule(optim)), batches, stop=settings.steps, hooks=[
        Progress(start=0, stop=settings.steps), MetricsFile(folder / "metrics.jsonl"),
        Evaluate(evaluation(sample), note, every=max(1, settings.steps // settings.evaluations)),
        SaveState(store, cfg, lambda step: {"step": step, "seed": settings.seed}, every=settings.steps)])
    seconds = time.perf_counter() - began
    store.close()
    write_model_files(folder / "checkpoints", cfg, beside=folder / "tokenizer")
    trained = read_metrics(folder / "metrics.jsonl")
    tokens = trained[-1]["tokens"]
    report.say("training", f"{tokens:,.0f} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s, "
               f"last loss {trained[-1]['loss']:.3f} nats a token")

    nats, _ = evaluation(documents["held out"])(state.params)
    bits = bits_per_byte(nats, report.values["held_out_bytes"])
    saved = 1 - bits / report.values["trigram_bits_per_byte"]
    report.values |= {"parameters": parameters, "steps": settings.steps, "train_tokens": round(tokens),
                      "tokens_per_second": tokens / seconds, "model_bits_per_byte": bits, "saved": saved}
    report.say("held out", f"model {bits:.3f} bits per byte, {saved:.1%} below the trigram "
               f"({MUST_SAVE:.0%} needed: {'reached' if saved >= MUST_SAVE else 'NOT reached'})")
    levels = {"byte trigram": report.values["trigram_bits_per_byte"], "xz -9e": report.values["xz_bits_per_byte"]}
    if not draw_loss_curve(folder / "loss.png", {line["step"]: line["loss"] for line in trained}, curve, levels):
        report.say("loss curve", "not drawn, matplotlib is not installed (pip install 'qwen2_jax[plots]')")
    return cfg, state.params


def _export(settings: Settings, folder: Path, cfg: ModelConfig, params: dict, documents: list[np.ndarray],
            report: Report) -> None:
    export_hf(params, cfg, folder / "hf", beside=folder / "tokenizer")
    lm = qwen2_jax.load(folder / "hf", dtype="float32")
    rows = np.stack([d[:settings.row_length] for d in documents if len(d) >= settings.row_length][:2])
    decoder = Decoder(cfg, stacked=jax.default_backend() != "cpu")

    @jax.jit
    def trained_logits(params, ids_BT):
        out: Any = decoder.apply({"params": params}, ids_BT)
        return logits(out.x_BTD, out.head["table"])

    before = np.asarray(trained_logits(params, jnp.asarray(rows, jnp.int32)))
    difference = float(np.abs(lm.logits(rows) - before).max())
    if not difference <= LOGIT_TOLERANCE:
        raise AssertionError(f"the exported model's logits differ by {difference:.2e}, more than {LOGIT_TOLERANCE:.0e}")
    report.values["logit_difference"] = difference
    report.say("export", f"safetensors written and loaded back, logits equal to {difference:.1e} "
               f"(at most {LOGIT_TOLERANCE:.0e})")
    for prompt, generation in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=settings.new_tokens, temperature=0.7,
                                                       top_p=0.8, seed=settings.seed), strict=True):
        print("\n    " + (prompt + generation.text).replace("\n", "\n    "))
    print()


def _finish(folder: Path, report: Report) -> None:
    report.values["seconds"] = time.perf_counter() - report.began
    (folder / SUMMARY).write_text(json.dumps(report.values, indent=2) + "\n", encoding="utf-8")


def _sample(documents: list[np.ndarray], texts: list[bytes], tokens: int) -> tuple[list[np.ndarray], int]:
    """The first documents, in an order that mixes modules, of about `tokens` tokens together; and their bytes."""
    chosen, n_bytes = [], 0
    for i in np.random.default_rng(0).permutation(len(documents)):
        if not chosen or sum(map(len, chosen)) + len(documents[i]) <= tokens:
            chosen.append(documents[i])
            n_bytes += len(texts[i])
    return chosen, n_bytes


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise AssertionError(f"the tokenizer trained here lacks {token}")
    return found


def _check_replaceable(out: Path) -> None:
    """Only an earlier run's folder, or an empty one, may be replaced."""
    if out.exists() and not (out / SUMMARY).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not the folder of an earlier quickstart: choose another with --out")


def _replace(out: Path, fresh: Path) -> None:
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: the model beat the trigram by MUST_SAVE; 1: it did not; 2: a user's error; 130: interrupted."""
    default = Settings()
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"),
                        help="folder for all results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the weights and of the data order")
    args = parser.parse_args(argv)
    enable_compilation_cache()
    try:
        if args.steps < 1:
            raise UserError(f"--steps must be at least 1, found {args.steps}")
        check_seed(args.seed)
        summary = quickstart(dataclasses.replace(default, steps=args.steps, seed=args.seed), args.out)
    except UserError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quickstart: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0 if summary["saved"] >= MUST_SAVE else 1


if __name__ == "__main__":
    sys.exit(main())
