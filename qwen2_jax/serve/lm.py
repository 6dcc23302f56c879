"""The library's front door: `load` a checkpoint, then ask for logits, likelihoods, text.

    lm = qwen2_jax.load("Qwen/Qwen2-0.5B-Instruct")
    lm.chat([{"role": "user", "content": "What is a monad?"}]).text
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.config import ModelConfig, RopeWhen
from qwen2_jax.data.chat import Message, chat_token_ids
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.tokenizer_files import has_tokenizer
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import param_specs
from qwen2_jax.ops.quant import Quant, check_quant, quant_of
from qwen2_jax.serve import score
from qwen2_jax.serve.defaults import GenerationDefaults, check_seed, check_settings, check_stop, check_truncate
from qwen2_jax.serve.engine import Engine, Output
from qwen2_jax.serve.limits import Limits
from qwen2_jax.serve.programs import DECODE_CHUNK, Programs
from qwen2_jax.serve.scheduler import Request, Sample
from qwen2_jax.serve.text import SampleText
from qwen2_jax.sharding.mesh import make_mesh, place, shardings
from qwen2_jax.sharding.processes import agreed

log = logging.getLogger("qwen2_jax")

Truncate = Literal["left"] | None
STREAM_STRETCH = 4
"""Tokens between two looks of the host when somebody watches the text appear."""
CPU_SLOTS, ACCELERATOR_SLOTS = 32, 128
SAID_SECONDS = 0.5
"""Compilations shorter than this are not worth a line."""


@dataclass(frozen=True)
class Generation:
    """One continuation, without prompt and stop token.

    `logprobs`: natural log-probability of each of `token_ids` under the raw logits (temperature 1, no filter).
    `finish_reason` is "stop" (a stop token or stop string) or "length". After a stop string, `token_ids` are those
    whose text begins before it, so the last one may reach into it.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: list[float]


def load(path: str | Path, *, dtype: Any = None, mesh: str | Mesh | None = None, quant: Quant = None,
         revision: str | None = None, ignore_fields: Sequence[str] = (), rope_when: RopeWhen = "always",
         notify: Callable[[str], None] | None = None) -> LM:
    """Open a checkpoint for use: a Hugging Face folder, a `.safetensors` file, an Orbax checkpoint or a hub id.

    Args:
      dtype: "float32" or "bfloat16" (or the JAX type): what weights are held and multiplied in; sums are float32.
        None: as config.json says, float32 where that is float16.
      mesh: None for one device, or axes like "fsdp=2x2,tensor=2" (docs/architecture.md): requests split over data,
        fsdp and expert, weights over fsdp, expert and tensor. Each process reads only what its devices hold.
      quant: "int8" holds matrices in int8 with a scale an output channel, quantized as they are read: half of
        bfloat16's memory, and other numbers (ops/quant.py). Activations and the cache stay in `dtype`.
      ignore_fields: names of unknown fields of config.json to pass over.
      rope_when: "long" leaves requests that fit the original context unscaled (YaRN, linear); "always" is
        transformers' rule.
      notify: called with a line about each compilation; by default a message of the logger `qwen2_jax`.

    Raises UserError that says what is missing or not supported.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"a checkpoint is a folder, a file or a hub id, found {path!r}")
    if rope_when not in get_args(RopeWhen):
        raise UserError(f"rope_when {rope_when!r} is not supported: {', '.join(get_args(RopeWhen))} are")
    if not isinstance(ignore_fields, Sequence) or isinstance(ignore_fields, str):
        raise UserError(f"ignore_fields must be a list of names of fields, found {ignore_fields!r}")
    check_quant(quant)
    checkpoint = open_checkpoint(path, revision=revision, ignore=ignore_fields)
    cfg = checkpoint.cfg
    if cfg.rope.kind != "default":
        cfg = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, when=rope_when))
    if cfg.head != "lm":
        raise UserError(f"{checkpoint.folder} has the head '{cfg.head}': it scores text and cannot write it")
    # bfloat16 has three bits less than float16: it is taken only when asked for.
    name = _dtype_name(dtype if dtype is not None else "float32" if cfg.dtype == "float16" else cfg.dtype)
    mesh = make_mesh(mesh)
    stacked = jax.default_backend() != "cpu"
    where = None if mesh is None else shardings(param_specs(cfg, mesh, stacked=stacked, quant=quant), mesh)
    params = load_params(checkpoint, cfg, dtype=name, stacked=stacked, shardings=where, quant=quant)
    tokenizer = Tokenizer.load(checkpoint.folder) if has_tokenizer(checkpoint.folder) else None
    return LM(params, cfg, tokenizer=tokenizer, defaults=GenerationDefaults.read(checkpoint.folder),
              dtype=jnp.dtype(name), stacked=stacked, mesh=mesh, notify=notify)


class LM:
    """A language model ready for use. Make one with `load`, or from a parameter tree in the matching layout: on a mesh,
    weights that lie otherwise than generation wants them, as training's may, are moved."""

    def __init__(self, params: dict, cfg: ModelConfig, *, tokenizer: Tokenizer | None = None,
                 defaults: GenerationDefaults | None = None, dtype: Any = jnp.float32, stacked: bool | None = None,
                 mesh: Mesh | None = None, notify: Callable[[str], None] | None = None):
        on_cpu = jax.default_backend() == "cpu"
        stacked = not on_cpu if stacked is None else stacked
        if mesh is not None:
            params = place(params, mesh, param_specs(cfg, mesh, stacked=stacked, quant=quant_of(params)))
        self.cfg, self.params, self.tokenizer = cfg, params, tokenizer
        self.defaults = defaults or GenerationDefaults()
        self.limits = Limits(cfg)
        self._notify = notify or log.info
        self._programs = Programs(params, cfg, dtype=dtype, stacked=stacked, mesh=mesh, notify=self._compiled)
        self._engine = Engine(self._programs, most_slots=CPU_SLOTS if on_cpu else ACCELERATOR_SLOTS)
        # generation_config.json goes before config.json; where the vocabulary is Qwen2's, both of its ids stop.
        self._stop_ids = dataclasses.replace(cfg, eos_ids=self.defaults.stop_ids or cfg.eos_ids).stop_ids

    def logits(self, ids: Any) -> list[np.ndarray] | np.ndarray:
        """Raw next-token logits, float32: for a list of lists of token ids a list of [T, V]; for an int array [B, T],
        [B, T, V]. Raises UserError: ids outside the vocabulary, an empty row, a row beyond the context."""
        rows = score.id_rows(ids, self.cfg.vocab)
        for i, row in enumerate(rows):
            self.limits.check(len(row), 0, f"row {i}")
        out = score.logits(self._programs, rows, [self.limits.is_long(len(row)) for row in rows])
        return np.asarray(out, np.float32).reshape(*ids.shape, self.cfg.vocab) if hasattr(ids, "ndim") else out

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], *, truncate: Truncate = None,
                      progress: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, summed over its tokens; does greedy decoding give it) of each pair.

        Context and continuation are tokenised together; spaces at the context's end count as the continuation's. An
        empty context is the end-of-text token. `truncate="left"` drops the front of contexts that are too long.
        `progress` is called with the number of pairs just done.

        Raises UserError: an empty continuation, one too long for the model, ids outside the vocabulary.
        """
        tokenizer = self._need_tokenizer()
        check_truncate(truncate)
        if not isinstance(pairs, Iterable):
            raise UserError(f"pairs must be a list of (context, continuation), found {pairs!r}")
        rows, starts = [], []
        for i, pair in enumerate(pairs):
            ids, start = score.encode_pair(tokenizer, pair, i)
            score.check_ids(ids, self.cfg.vocab, f"pair {i}")
            # The last token is predicted, not read, so it needs no room.
            read, cut = self.limits.fit(ids[:-1], 0, f"pair {i} without its last token", truncate)
            if start - cut < 1:
                raise UserError(f"pair {i}: its continuation alone exceeds the context of {self.limits.context} tokens")
            rows.append([*read, ids[-1]])
            starts.append(start - cut)
        long = [self.limits.is_long(len(row) - 1) for row in rows]
        return score.loglikelihoods(self._programs, rows, starts, long, progress)

    def generate(self, prompts: str | Sequence[str | Sequence[int]], *, max_new_tokens: int | None = None,
                 temperature: float | None = None, top_p: float | None = None, top_k: int | None = None,
                 repetition_penalty: float | None = None, stop: str | Sequence[str] | None = (),
                 seed: int | None = None, n: int = 1, truncate: Truncate = None,
                 on_text: Callable[[int, str], None] | None = None,
                 on_done: Callable[[int, Generation], None] | None = None) -> list[Generation]:
        """Continue every prompt (text, or token ids) `n` times; a prompt's samples lie side by side in the result.

        Values left out come from the checkpoint's generation_config.json. Temperature 0 is greedy. Filters work in
        transformers' order: repetition penalty (over prompt and output), temperature, top-k, top-p. A sample's tokens
        are a function of its prompt, its settings, `seed` and its number in `n`; not of what else is generated with it.
        Without `seed` each call draws afresh.

        Args:
          max_new_tokens: 0 gives empty texts. When left out, what the checkpoint says, as far as the context holds it.
          stop: strings that end a text; they are not part of it. One that is a control token of the tokenizer stops
            at that token.
          truncate: "left" drops the front of a prompt that is too long; None refuses it.
          on_text: called with (index in the result, new text) as text becomes certain.
          on_done: called with (index in the result, generation) as each is complete.

        Raises UserError: an empty prompt, ids outside the vocabulary, a setting out of range, too many tokens.
        """
        check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                       repetition_penalty=repetition_penalty, stop=stop, seed=seed, n=n, truncate=truncate)
        if isinstance(prompts, str):
            prompts = [prompts]
        elif getattr(prompts, "ndim", 0):       # an array's rows, numpy's or JAX's
            prompts = list(np.asarray(prompts))
        elif not isinstance(prompts, Sequence):
            raise UserError(f"prompts must be a text, or a list of texts or of lists of token ids, found {prompts!r}")
        sampling = self.defaults.choose(temperature=temperature, top_p=top_p, top_k=top_k,
                                        repetition_penalty=repetition_penalty)
        if temperature is None and sampling.temperature == 0 and (top_p is not None or top_k is not None):
            self._notify("decoding is greedy, so top_p and top_k have no effect; give a temperature to sample")
        requests = []
        seeds = agreed([check_seed(seed) for _ in prompts], self._programs.mesh)     # fresh ones are process 0's
        for i, prompt in enumerate(prompts):
            ids, new = self.fit_prompt(self.prompt_ids(prompt, f"prompt {i}"), max_new_tokens, truncate, f"prompt {i}")
            requests.append(Request(prompt_ids=tuple(ids), max_new_tokens=new, sampling=sampling, seed=seeds[i],
                                    samples=n, long=self.limits.is_long(len(ids) + new)))
        return self._run(requests, check_stop(stop), on_text, on_done)

    def chat(self, messages: Sequence[Message], *, on_text: Callable[[str], None] | None = None,
             **settings: Any) -> Generation:
        """The assistant's next message. `settings` as for `generate`; `on_text` is called with text as it comes."""
        heard = None if on_text is None else lambda _, text: on_text(text)
        return self.generate([self.chat_ids(messages)], on_text=heard, **settings)[0]

    def prompt_ids(self, prompt: str | Sequence[int], what: str = "the prompt") -> list[int]:
        """Token ids of a prompt, checked. Raises UserError when it is empty."""
        if not isinstance(prompt, str):
            return score.check_ids(prompt, self.cfg.vocab, what)
        if not prompt:
            raise UserError(f"{what} is empty: there is nothing to continue")
        return score.check_ids(self._need_tokenizer().encode(prompt), self.cfg.vocab, what)

    def fit_prompt(self, ids: list[int], max_new_tokens: int | None, truncate: Truncate = None,
                   what: str = "the prompt") -> tuple[list[int], int]:
        """(ids, new tokens) as `generate` will run them; UserError with the numbers when the context is too small."""
        new = max_new_tokens
        if new is None:
            new = self.limits.default_new(len(ids), self.defaults.max_new_tokens)
        return self.limits.fit(ids, new, what, truncate)[0], new

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation with the assistant's header behind it, by the checkpoint's template or ChatML."""
        return score.check_ids(chat_token_ids(self._need_tokenizer(), messages), self.cfg.vocab, "the conversation")

    def _run(self, requests: list[Request], stop: tuple[str, ...], on_text: Callable[[int, str], None] | None,
             on_done: Callable[[int, Generation], None] | None) -> list[Generation]:
        tokenizer = self._need_tokenizer() if stop or on_text else self.tokenizer
        index = {s: i for i, s in enumerate(Sample(r, k) for r, q in enumerate(requests) for k in range(q.samples))}
        texts = {}
        if tokenizer is not None:
            for sample, i in index.items():
                texts[sample] = SampleText(tokenizer, stop, None if on_text is None else partial(on_text, i))

        def listen(sample: Sample, ids: list[int]) -> bool:
            return sample in texts and texts[sample].push(ids)

        def finished(sample: Sample, output: Output) -> None:
            generations[index[sample]] = generation = _generation(requests[sample.request], output, texts.get(sample))
            if on_done is not None:
                on_done(index[sample], generation)

        generations: list[Any] = [None] * len(index)
        # Control tokens have no text that a stop string could match.
        control = () if tokenizer is None else tokenizer.special_ids & {tokenizer.token_id(s) for s in stop}
        self._engine.run(requests, stop_ids=(*self._stop_ids, *control), on_tokens=listen, on_done=finished,
                         stretch=STREAM_STRETCH if on_text else DECODE_CHUNK)
        return generations

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer (tokenizer.json): give token ids, or copy it there")
        return self.tokenizer

    def _compiled(self, what: str, seconds: float) -> None:
        if seconds >= SAID_SECONDS:
            self._notify(f"compiled {what} in {seconds:.1f} s")


def _generation(request: Request, output: Output, text: SampleText | None) -> Generation:
    """Text and ids of a finished sample, without its stop token or what a stop string cut off."""
    ids, logprobs = output.token_ids, output.logprobs
    if output.ended_by_token:
        ids, logprobs = ids[:-1], logprobs[:-1]
    shown = ""
    if text is not None:
        text.finish()
        kept = text.kept_tokens(ids)
        shown, ids, logprobs = text.text, ids[:kept], logprobs[:kept]
    stopped = output.ended_by_token or (text is not None and text.cut)
    return Generation(shown, ids, "stop" if stopped else "length", len(request.prompt_ids), logprobs)


def _dtype_name(dtype: Any) -> Literal["bfloat16", "float32"]:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("bfloat16", "float32"):
        raise UserError(f"dtype {name!r} is not supported: float32 and bfloat16 are")
    return name
