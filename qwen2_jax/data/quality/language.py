"""Which language a text is in, by py3langid (Lui and Baldwin 2012), whose wheel holds its model."""

from __future__ import annotations

import functools
from typing import Any

from qwen2_jax.errors import UserError

_MOST_CHARACTERS = 20_000   # of a text that are looked at: enough to be sure, and a book costs no more than an article


@functools.cache
def py3langid() -> Any:
    """py3langid's own identifier, whose model takes a second to read."""
    try:
        from py3langid import langid
    except ImportError as error:
        raise UserError('languages are told apart with py3langid, which is not installed: '
                        'pip install "qwen2_jax[data]"') from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class LanguageIdentifier:
    """Names the language of a text. Raises UserError where py3langid is not installed."""

    def __init__(self) -> None:
        self._identifier = py3langid()

    def __call__(self, text: str) -> tuple[str, float]:
        """(ISO 639 code, confidence from 0 to 1); `zxx` is text in no language, such as numbers.

        Looks at the first 20,000 characters. Short texts and code get low confidence.
        """
        return self._identifier.classify(text[:_MOST_CHARACTERS])

    def languages(self) -> list[str]:
        """The codes that can be answered."""
        return sorted(self._identifier.labels)
