"""From a sample's tokens to its text: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen2_jax.data.tokenizer import Tokenizer


class SampleText:
    """Text of one sample as its tokens come. Stop strings match across token borders and are cut, with all behind them.

    `on_text` is called with text that no later token can change: what might be the beginning of a stop string waits.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None] | None = None):
        self._stream = tokenizer.stream(skip_special=True)
        self._stop = tuple(stop)
        self._on_text = on_text
        self._starts: list[int] = []  # where each token's text begins
        self._shown = 0
        self.text = ""
        self.cut = False

    def push(self, ids: Sequence[int]) -> bool:
        """Take new tokens; true once a stop string has ended the text."""
        for i in ids:
            self._starts.append(len(self.text))
            if self._extend(self._stream.push([i])):
                break
        self._show(self._certain())
        return self.cut

    def finish(self) -> None:
        """No more tokens come: an unfinished character becomes U+FFFD, what waited is shown."""
        if not self.cut:
            self._extend(self._stream.finish())
        self._show(len(self.text))

    def kept_tokens(self, ids: Sequence[int]) -> int:
        """How many of all tokens pushed begin before the cut: those that the text is made of."""
        if not self.cut:
            return len(ids)
        return sum(start < len(self.text) for start in self._starts)

    def _extend(self, piece: str) -> bool:
        before, self.text = len(self.text), self.text + piece
        found = [(at + len(s), at) for s in self._stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:
            # The stop string that is complete first, so that it does not matter how the text was cut into tokens.
            self.text, self.cut = self.text[:min(found)[1]], True
        return self.cut

    def _certain(self) -> int:
        if self.cut:
            return len(self.text)
        tails = (n for s in self._stop for n in range(min(len(s) - 1, len(self.text)), 0, -1)
                 if self.text.endswith(s[:n]))
        return len(self.text) - max(tails, default=0)

    def _show(self, upto: int) -> None:
        if self._on_text is not None and upto > self._shown:
            self._on_text(self.text[self._shown:upto])
        self._shown = max(self._shown, upto)
