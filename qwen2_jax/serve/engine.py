"""Running requests: fill slots, decode a stretch on the device, hand tokens out, refill. Token ids only, no text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from qwen2_jax.errors import UserError
from qwen2_jax.ops.sample import SamplingSettings
from qwen2_jax.serve.programs import DECODE_CHUNK, Admission, Programs, PromptState, SlotState
from qwen2_jax.serve.scheduler import (
    Placement,
    Request,
    Sample,
    Sampling,
    Scheduler,
    cache_length,
    prefill_calls,
    prefill_chunks,
    prefill_groups,
    slot_count,
)
from qwen2_jax.sharding.mesh import BATCH_SPEC
from qwen2_jax.sharding.processes import agreed, check_same, fetch, put

OnTokens = Callable[[Sample, list[int]], bool]
"""Called with a sample's new tokens, stop token excluded; true ends the sample there."""

CACHE_BYTES = 4 << 30
"""Most that all rows of the cache take on a device, unless a single row takes more: long requests get fewer slots."""
FIRST_STRETCH = 4
LONGEST_LOOK = 1.0
"""Seconds on the device after which the host wants to look, for a Ctrl-C is noticed only then."""

_NOBODY = Request(prompt_ids=(), max_new_tokens=0, sampling=Sampling())


@dataclass
class Output:
    """What one sample drew, a stop token included; natural log-probabilities under the raw logits."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended_by_token: bool = False


class Engine:
    """Generation for one model. `most_slots` bounds the samples that run side by side."""

    def __init__(self, programs: Programs, *, most_slots: int):
        self._programs = programs
        self._most_slots = most_slots
        self._devices = programs.devices

    def run(self, requests: Sequence[Request], *, stop_ids: Sequence[int], on_tokens: OnTokens,
            on_done: Callable[[Sample, Output], None], stretch: int = DECODE_CHUNK) -> None:
        """Draw every sample of every request. `stretch`: most tokens drawn on the device between two looks of the host.
        Slow models draw fewer, down to one (LONGEST_LOOK); that changes when tokens arrive, never which.

        On a mesh over several processes each of them calls this with the same requests and hears of the same tokens."""
        mesh = self._programs.mesh
        check_same("requests", (list(requests), list(stop_ids), stretch), mesh)
        samples = [Sample(r, n) for r, request in enumerate(requests) for n in range(request.samples)]
        wanted = [s for s in samples if requests[s.request].max_new_tokens > 0]
        for sample in set(samples) - set(wanted):
            on_done(sample, Output())
        if not wanted:
            return
        room = cache_length(max(map(_room, {requests[s.request] for s in wanted})))
        fitting = self._devices * (CACHE_BYTES // self._programs.cache_bytes(room))
        slots = slot_count(len(wanted), self._devices, min(self._most_slots, fitting))
        state, prompt = self._programs.new_state(slots, room), self._programs.new_prompt(room)
        scheduler = Scheduler(wanted, devices=self._devices, slots=slots)
        running: dict[tuple[int, int], tuple[Sample, Output]] = {}
        steps = min(FIRST_STRETCH, stretch)
        while True:
            placements = scheduler.admit()
            state, prompt = self._start(state, prompt, requests, placements)
            running |= {(p.device, p.slot): (p.sample, Output()) for p in placements}
            if not running:
                return
            jax.block_until_ready(state)  # the prompts are not part of the stretch that is timed
            began = time.perf_counter()
            state, drawn = self._programs.decode(state, stop_ids, steps)
            tokens, logprobs, counts, stopped = fetch(drawn, mesh, BATCH_SPEC)
            # Clocks differ, and processes must go the same way: process 0's decides.
            [steps] = agreed([next_stretch(steps, time.perf_counter() - began, stretch)], mesh)
            for (device, slot), (sample, output) in list(running.items()):
                row = device * (slots // self._devices) + slot
                new = tokens[row, :counts[row]].tolist()
                new_logprobs = logprobs[row, :counts[row]].tolist()
                output.token_ids += new
                output.logprobs += new_logprobs
                if any(map(math.isnan, new_logprobs)):
                    raise UserError("the model's logits are not numbers (NaN): a weight of the checkpoint is NaN or"
                                    " infinite, or too large for this dtype; dtype float32 rules out the last")
                output.ended_by_token = bool(stopped[row])
                cut = on_tokens(sample, new[:-1] if output.ended_by_token else new)
                budget_left = requests[sample.request].max_new_tokens - len(output.token_ids)
                if cut and budget_left and not output.ended_by_token:
                    state = self._end(state, device, slot)
                if cut or output.ended_by_token or not budget_left:
                    on_done(sample, output)
                    del running[device, slot]
                    scheduler.release(device, slot)

    def _start(self, state: SlotState, prompt: PromptState, requests: Sequence[Request],
               placements: list[Placement]) -> tuple[SlotState, PromptState]:
        """Prefill the placed samples' prompts, each once a device, and wake their slots."""
        for group in prefill_groups(placements):
            by_device = {device: requests[members[0].sample.request] for device, members in group.items()}
            prompt = self._prefill(prompt, by_device)
            for turn in range(max(map(len, group.values()))):
                state = self._insert(state, prompt, requests, [m[turn] for m in group.values() if turn < len(m)])
        return state, prompt

    def _prefill(self, prompt: PromptState, requests: dict[int, Request]) -> PromptState:
        for width, chunks in prefill_calls({device: r.prompt_ids for device, r in requests.items()}):
            ids = np.zeros((self._devices, width), np.int32)
            start, count, long, active = (np.zeros(self._devices, dtype) for dtype in (np.int32, np.int32, bool, bool))
            for device, chunk in chunks.items():
                request = requests[device]
                ids[device, :chunk.count] = request.prompt_ids[chunk.start:chunk.start + chunk.count]
                start[device], count[device] = chunk.start, chunk.count
                long[device], active[device] = request.long, True
            prompt = self._programs.prefill(prompt, *self._place((ids, start, count, long, active)))
        return prompt

    def _insert(self, state: SlotState, prompt: PromptState, requests: Sequence[Request],
                placements: Sequence[Placement]) -> SlotState:
        """One placement a device at most."""
        slot, active = np.zeros(self._devices, np.int32), np.zeros(self._devices, bool)
        entries = [(_NOBODY, 0)] * self._devices
        for p in placements:
            slot[p.device], active[p.device] = p.slot, True
            entries[p.device] = requests[p.sample.request], p.sample.number
        asked = [request for request, _ in entries]
        admission = Admission(
            np.asarray([r.max_new_tokens for r in asked], np.int32), np.asarray([r.seed for r in asked], np.uint32),
            np.asarray([number for _, number in entries], np.uint32), np.asarray([r.long for r in asked]),
            SamplingSettings(np.asarray([r.sampling.temperature for r in asked], np.float32),
                             np.asarray([r.sampling.top_k for r in asked], np.int32),
                             np.asarray([r.sampling.top_p for r in asked], np.float32),
                             np.asarray([r.sampling.repetition_penalty for r in asked], np.float32)))
        return self._programs.insert(state, prompt, *self._place((slot, active, admission)))

    def _end(self, state: SlotState, device: int, slot: int) -> SlotState:
        """Put a slot to rest before its budget is used up."""
        active = np.arange(self._devices) == device
        return self._programs.end(state, *self._place((np.full(self._devices, slot, np.int32), active)))

    def _place(self, arrays):
        return put(arrays, self._programs.mesh, BATCH_SPEC)


def next_stretch(steps: int, seconds: float, most: int) -> int:
    """Steps of the next stretch after one of `steps` that took `seconds`: twice as many, or as many as fit."""
    return max(1, min(2 * steps, int(steps * LONGEST_LOOK / seconds), most))


def _room(request: Request) -> int:
    """Cache slots a request needs: its tokens, or its last prefill chunk with the padding."""
    prompt = len(request.prompt_ids)
    return max(prompt + request.max_new_tokens, *(c.start + c.width for c in prefill_chunks(prompt)))
