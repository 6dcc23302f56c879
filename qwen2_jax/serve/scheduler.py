"""Which request runs where and in which shapes: pure Python, no arrays.

Few shapes, so few compilations: a prompt is cut into chunks of at most PREFILL_CHUNKS[-1] tokens, slots come in
SLOT_COUNTS, cache lengths in powers of two. How a prompt is cut depends on its own length alone, so that its numbers
do not depend on its company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PREFILL_CHUNKS = (32, 128, 512)
SLOT_COUNTS = (1, 8, 32, 128)
SHORTEST_CACHE = 512


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1, repetition_penalty 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue `samples` times. `seed` and the sample's number make its randomness, nothing else does."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    samples: int = 1
    long: bool = False


class Sample(NamedTuple):
    """One continuation of one request, by their numbers."""

    request: int
    number: int


class Chunk(NamedTuple):
    """`count` tokens of a prompt from `start` on, run as `width` (≥ count) padded ones."""

    start: int
    width: int
    count: int


def prefill_chunks(tokens: int) -> list[Chunk]:
    """Cut a prompt: full chunks of the largest width, then the rest in the narrowest width that needs at most three.
    Each starts at a multiple of its width (`ops.flash.flash_attend_cache`)."""
    chunks, start = [], 0
    while tokens - start:
        left = tokens - start
        width = next((w for w in PREFILL_CHUNKS if left <= 3 * w), PREFILL_CHUNKS[-1])
        chunks.append(Chunk(start, width, min(width, left)))
        start += chunks[-1].count
    return chunks


def slot_count(samples: int, devices: int, most: int) -> int:
    """Slots for so many samples: a shape from SLOT_COUNTS a device, at most `most` in all (but one a device)."""
    per_device = -(-min(samples, max(most, devices)) // devices)
    fitting = [n for n in SLOT_COUNTS if n * devices <= max(most, devices)]
    return devices * next((n for n in fitting if n >= per_device), fitting[-1])


def cache_length(tokens: int) -> int:
    """Cache slots for rows of up to `tokens` tokens: a power of two, at least SHORTEST_CACHE."""
    return max(SHORTEST_CACHE, 1 << (tokens - 1).bit_length())


class Placement(NamedTuple):
    """A sample given a slot (its number on its device)."""

    sample: Sample
    device: int
    slot: int


class Scheduler:
    """Samples that wait, and the slots of each device. Samples start in order; a freed slot is filled at once."""

    def __init__(self, samples: Iterable[Sample], *, devices: int, slots: int):
        self._waiting = deque(samples)
        self._free = [deque(range(slots // devices)) for _ in range(devices)]

    def admit(self) -> list[Placement]:
        """Give free slots to waiting samples. Samples of one request that start together go to one device while it has
        room, so that it prefills their prompt once."""
        placed: list[Placement] = []
        while self._waiting and any(self._free):
            sample = self._waiting.popleft()
            same = bool(placed) and placed[-1].sample.request == sample.request
            device = placed[-1].device if same else 0
            if not same or not self._free[device]:
                device = max(range(len(self._free)), key=lambda d: len(self._free[d]))
            placed.append(Placement(sample, device, self._free[device].popleft()))
        return placed

    def release(self, device: int, slot: int) -> None:
        self._free[device].append(slot)


def prefill_groups(placements: Sequence[Placement]) -> list[dict[int, list[Placement]]]:
    """Placements by shared prompt: each group has, for some devices, the placements of one request on that device."""
    prompts: dict[int, list[list[Placement]]] = {}
    for p in placements:
        groups = prompts.setdefault(p.device, [])
        if not groups or groups[-1][0].sample.request != p.sample.request:
            groups.append([])
        groups[-1].append(p)
    deepest = max(map(len, prompts.values()), default=0)
    return [{d: groups[i] for d, groups in prompts.items() if i < len(groups)} for i in range(deepest)]


def prefill_calls(prompts: Mapping[int, Sequence[int]]) -> list[tuple[int, dict[int, Chunk]]]:
    """One prompt a device → calls in which all chunks have one width: [(width, {device: chunk}), …]."""
    heads = {device: deque(prefill_chunks(len(ids))) for device, ids in prompts.items()}
    calls = []
    while any(heads.values()):
        width = max(head[0].width for head in heads.values() if head)
        calls.append((width, {d: head.popleft() for d, head in heads.items() if head and head[0].width == width}))
    return calls
