"""What the processes of a program do together around a checkpoint, each with the same calls in the same order. Goes by
the network of the hosts and touches no device, so a thread beside training may do it. One process does its own part."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax

from qwen2_jax.errors import UserError
from qwen2_jax.sharding import distributed

SECONDS = 1200.0
"""How long one process waits for what another writes or reads, as Orbax does."""
_numbers = itertools.count()


class Together:
    """A series of talks; made in all processes. `subject`s stand in messages about a process that says nothing."""

    def __init__(self):
        self._number, self._talks = next(_numbers), itertools.count()

    def first(self, subject: str, decide: Callable[[], Any]) -> Any:
        """What `decide` returns (JSON) in process 0, in all processes; its error too."""
        return self._exchange(subject, decide if distributed.is_first() else lambda: None)[0]

    def each(self, subject: str, part: Callable[[slice], dict[str, Any]]) -> dict[str, Any]:
        """The dicts that the processes make, each of its share of a list, joined; in all of them."""
        share = slice(jax.process_index(), None, jax.process_count())
        return {key: value for found in self._exchange(subject, lambda: part(share)) for key, value in found.items()}

    def _exchange(self, subject: str, act: Callable[[], Any]) -> list[Any]:
        """What `act` (JSON) returns in each process, in all of them. An error of one is raised in all."""
        mine, error = None, None
        try:
            mine = act()
        except Exception as e:
            error = e
        heard = distributed.exchange(f"checkpoints ({self._number}.{next(self._talks)}, {subject})",
                                     [mine, None if error is None else str(error) or repr(error)],
                                     seconds=SECONDS, forget=True)
        if error is not None:
            raise error
        for number, (_, text) in enumerate(heard):
            if text is not None:
                raise UserError(f"process {number}: {text}")
        return [value for value, _ in heard]
