"""Which documents are in the languages wanted and pass Gopher's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from qwen2_jax.data.quality.heuristics import broken_rules
from qwen2_jax.data.quality.language import LanguageIdentifier
from qwen2_jax.data.quality.rules import GopherRules
from qwen2_jax.data.quality.sift import Reason, Sieve, judged
from qwen2_jax.data.source_files import SourceFile, SourceOptions
from qwen2_jax.data.sources import BadRows
from qwen2_jax.errors import UserError


@dataclass(frozen=True)
class Languages:
    """The languages that stay, as ISO 639 codes, and how sure their identification must be."""

    wanted: Sequence[str]
    min_confidence: float = 0.5

    def __post_init__(self):
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"the least confidence is {self.min_confidence}: it must be from 0 to 1")


def filter_documents(files: Sequence[SourceFile], options: SourceOptions, sieve: Sieve, *, languages: Languages | None,
                     rules: GopherRules | None, workers: int = 1, max_bad_rows: int = 0) -> None:
    """Puts the rows of `files` through `sieve`: those in `languages` that break none of `rules` stay; None asks for
    nothing. Raises UserError as `judged` does, and for a language that is not known."""
    if languages is not None:
        known = LanguageIdentifier().languages()
        if unknown := [code for code in languages.wanted if code not in known]:
            raise UserError(f"language {unknown[0]!r} is not known; known are {', '.join(known)}")
    for row in judged(files, options, partial(_start, languages, rules), workers=workers, title="filter",
                      bad=BadRows(max_bad_rows)):
        sieve.put(row, row.verdict)


def _start(languages: Languages | None, rules: GopherRules | None) -> Callable[[str], Reason | None]:
    return partial(_judge, LanguageIdentifier() if languages is not None else None, languages, rules)


def _judge(identify: LanguageIdentifier | None, languages: Languages | None, rules: GopherRules | None, text: str
           ) -> Reason | None:
    if identify is not None and languages is not None:
        language, confidence = identify(text)
        other = language not in languages.wanted
        if other or confidence < languages.min_confidence:
            return {"reason": "other_language" if other else "unsure_language", "language": language,
                    "confidence": round(confidence, 4)}
    if rules is None or not (broken := broken_rules(text, rules)):
        return None
    first, *others = ({"rule": found.rule, "value": found.value, "limit": found.limit} for found in broken)
    return {"reason": first.pop("rule"), **first} | ({"also": others} if others else {})
