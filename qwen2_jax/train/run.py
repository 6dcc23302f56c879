"""A whole training run: from an experiment to a folder with its checkpoints, whatever interrupts it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax.checkpoint.files import write_model_files
from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.data.loader import Loader
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import init_params
from qwen2_jax.optim.adamw import make_optimizer, schedule
from qwen2_jax.settings import differences
from qwen2_jax.sharding import distributed
from qwen2_jax.sharding.mesh import make_mesh, shardings
from qwen2_jax.train import run_folder
from qwen2_jax.train.corpus import Corpus, open_corpus
from qwen2_jax.train.evaluate import Evaluate, held_out_losses
from qwen2_jax.train.experiment import Experiment
from qwen2_jax.train.feed import on_devices, own_rows
from qwen2_jax.train.loop import Hook, fit
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.metrics import NOTHING, LinesFile, MetricsFile, Progress, Totals
from qwen2_jax.train.preemption import Preemption
from qwen2_jax.train.resume import SaveState, restore_state, stored_state
from qwen2_jax.train.run_folder import CHECKPOINTS, Start, write_status
from qwen2_jax.train.step import TrainState, init_state, make_step

PATIENCE = 600.0
"""Seconds that processes wait for one another's imports."""


def train(start: Start, *, say: Callable[[str], None], peak_flops: Callable[[Experiment], float | None],
          hooks: Callable[[Start, Corpus], Sequence[Hook]] = lambda start, corpus: ()) -> int:
    """Makes the run in `start.folder` as long as its experiment says; returns the exit status: 0, or
    `preempt_exit_code` when SIGTERM came, after the step at hand and a checkpoint.

    `peak_flops`: model FLOPs of a step over those a second of all devices at their peak, None where that is unknown.
    Every process of a program calls this alike. Raises UserError for whatever the user can put right.
    """
    with Preemption(lambda: _leave(start, say)) as preemption:
        return _train(start, preemption, say, peak_flops, hooks)


def _leave(start: Start, say: Callable[[str], None]) -> int:
    """SIGTERM came before the first step."""
    status = run_folder.read_status(start.folder)
    write_status(start.folder, "preempted", status.get("step", 0), start.experiment.steps)
    say("stopped by SIGTERM before the first step; the same command goes on")
    return start.experiment.preempt_exit_code


def _train(start: Start, preemption: Preemption, say: Callable[[str], None],
           peak_flops: Callable[[Experiment], float | None], hooks: Callable[[Start, Corpus], Sequence[Hook]]) -> int:
    experiment, folder = start.experiment, start.folder
    mesh = make_mesh(experiment.mesh)
    rows = own_rows(mesh, experiment.data.batch_size)
    writes = distributed.is_first()
    distributed.exchange("start", None, seconds=PATIENCE)   # all have looked at the folder before one writes there
    if writes:
        if start.other_text:
            for made in (run_folder.TOKENIZER, run_folder.DATA):
                shutil.rmtree(folder / made, ignore_errors=True)
        run_folder.write_config(start)      # first, so that a start that is killed can be made again
        write_status(folder, "starting", 0, experiment.steps)
    corpus = open_corpus(experiment, folder, source=start.source, say=say)
    store = Store(folder / CHECKPOINTS, keep=experiment.checkpoint.keep, keep_every=experiment.checkpoint.keep_every)
    try:
        run = _Run(start, mesh, corpus, store, say)
        state, first, totals = run.state()
        if first >= experiment.steps:
            if writes:
                write_status(folder, "finished", first, experiment.steps)
            say(f"{folder} has made its {first} steps already; --set steps=… goes on")
            return 0
        if writes:
            write_status(folder, "running", first, experiment.steps)
        made = [Progress(start=first, stop=experiment.steps)] if writes else []
        metrics = MetricsFile(folder / "metrics.jsonl" if writes else None, start=first, totals=totals,
                              flops_share=peak_flops(experiment))
        scores = LinesFile(folder / "eval.jsonl" if writes and corpus.held_out else None, start=first)

        def sync() -> None:
            metrics.sync()
            scores.sync()

        save = SaveState(store, experiment.model, lambda step: run.about(step, metrics.totals),
                         every=experiment.checkpoint.every, before=sync)
        every = [*made, metrics, run.evaluation(scores), save, *hooks(start, corpus)]
        with Loader(corpus.stream, first, rows=rows, workers=experiment.data.workers) as loader:
            batches = on_devices(loader, mesh, experiment.data.batch_size)
            try:
                _, last = fit(state, run.step, batches, start=first, stop=experiment.steps, hooks=every,
                                  stopped=preemption.reached)
            except BaseException as error:
                if writes:
                    state = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
                    write_status(folder, state, store.latest_step() or 0, experiment.steps)
                raise
        done = last == experiment.steps
        if writes:
            write_status(folder, "finished" if done else "preempted", last, experiment.steps)
        if not done:
            say(f"stopped by SIGTERM after step {last} of {experiment.steps}, which is saved; the same command goes on")
        return 0 if done else experiment.preempt_exit_code
    finally:
        store.close()


class _Run:
    """What a run is made of, on the devices of this program."""

    def __init__(self, start: Start, mesh: Mesh | None, corpus: Corpus, store: Store, say: Callable[[str], None]):
        self.start, self.mesh, self.corpus, self.store, self.say = start, mesh, corpus, store, say
        experiment = start.experiment
        self.cfg = experiment.model
        on_cpu = jax.default_backend() == "cpu"
        sources = tuple(corpus.stream.sources)
        dtype = ("float32" if on_cpu else "bfloat16") if experiment.dtype == "auto" else experiment.dtype
        self.loss = NextTokenLoss(model=self.cfg, dtype=dtype, stacked=not on_cpu, remat=experiment.remat,
                                  z_coef=experiment.z_coef, expert_exchange=experiment.expert_exchange,
                                  reduce_dtype=experiment.reduce_dtype,
                                  sources=sources if len(sources) > 1 else ())
        self.specs = self.loss.param_specs(mesh)
        where = None if mesh is None else shardings(self.specs, mesh)
        self.optimizer = make_optimizer(experiment.optimizer, where)
        self.step = make_step(self.loss, self.optimizer, schedule(experiment.optimizer), mesh=mesh,
                              micro_batches=experiment.micro_batches)

    def state(self) -> tuple[TrainState, int, Totals]:
        """(state, updates made, totals) to begin with: saved as step 0 where the run is new."""
        state = init_state(self._weights(), self.optimizer, self.mesh, self.specs)
        if (begun := self._restored(state)) is not None:
            return begun
        write_model_files_once(self.store, self.cfg, self.corpus.tokenizer)
        self.store.save(0, stored_state(state, self.cfg), self.about(0, NOTHING))
        return state, 0, NOTHING

    def _restored(self, like: TrainState) -> tuple[TrainState, int, Totals] | None:
        source, step = self.start.source, self.start.step
        if source is None:
            return None
        own = source == self.start.folder
        store = self.store if own else Store(source / CHECKPOINTS, read_only=True)
        try:
            if own and step is None and store.latest_step() is None:
                return None     # killed before anything was saved
            state, about = restore_state(store, self.cfg, like, step)
        finally:
            if not own:
                store.close()
        if "data" in about:
            self._check_data(about["data"])
        found = int(about["step"])
        if own:
            store.discard_after(found)
        else:
            write_model_files_once(self.store, self.cfg, self.corpus.tokenizer)
        self.say(f"going on from step {found} of {source}")
        return state, found, Totals(**about["totals"])

    def _check_data(self, saved: dict[str, Any]) -> None:
        now = self.corpus.stream.identity()
        if changed := differences(saved, now):
            if self.start.source == self.start.folder:
                raise UserError(f"{self.start.folder} was trained on other data than there is now: "
                                + "; ".join(f"{name} was {a}, is {b}" for name, (a, b) in changed.items())
                                + ". Restore the data, or go on in a new folder with --fork NEWDIR")

    def _weights(self) -> dict:
        stacked, experiment = self.loss.stacked, self.start.experiment
        if experiment.start_from and self.start.source is None:
            where = None if self.mesh is None else shardings(self.specs, self.mesh)
            return load_params(experiment.start_from, self.cfg, dtype="float32", stacked=stacked, shardings=where)
        return init_params(self.cfg, jax.random.key(experiment.seed), stacked=stacked, mesh=self.mesh,
                           specs=None if self.mesh is None else self.specs)

    def about(self, step: int, totals: Totals) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        return {"step": step, "totals": totals._asdict(), "data": self.corpus.stream.identity(),
                "versions": run_folder.versions()}

    def evaluation(self, scores: LinesFile) -> Hook:
        if not self.corpus.held_out:
            return Hook()
        settings, data = self.start.experiment.evaluation, self.start.experiment.data
        losses = held_out_losses(self.loss, self.corpus.held_out, settings.documents, row_length=data.row_length,
                                 batch_size=data.batch_size, mesh=self.mesh)
        return Evaluate(losses, scores.write, every=settings.every, close=scores.close)


def write_model_files_once(store: Store, cfg: Any, tokenizer: Path | None) -> None:
    """The model's own files beside the steps, so that each step is a checkpoint that `load` and `convert` take."""
    if distributed.is_first() and not (store.path / "config.json").exists():
        write_model_files(Path(store.path), cfg, beside=tokenizer)
