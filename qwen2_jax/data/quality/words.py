"""Text as the sequence of words that two texts are compared by: punctuation, symbols and spacing do not count."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

# Scripts that put no space between words: each of their characters, with its marks, is a word of its own.
_UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"     # Thai and Lao, Burmese, Khmer
                       "\u2e80-\u2fdf\u3005-\u3007\u3021-\u302f\u3040-\u30ff\u3105-\u312f\u31a0-\u31ff"
                       "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff")    # Chinese, Japanese
_MARKS = "".join(char for char in map(chr, range(0x0E00, 0x3100)) if unicodedata.category(char)[0] == "M")
_WORD = re.compile(f"[{_UNSPACED}][{_MARKS}]*|[^ {_UNSPACED}]+")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_LOOKED_AT = 10_000


def is_mostly_unspaced(text: str) -> bool:
    """Are more than half of the letters of `text` of scripts that put no space between words (Chinese, Japanese, Thai,
    Lao, Burmese, Khmer)? Looks at the first 10,000 characters."""
    if text.isascii():
        return False
    start = text[:_LOOKED_AT]
    return 2 * len(_UNSPACED_CHARACTER.findall(start)) > sum(map(str.isalpha, start))


@dataclass(frozen=True)
class Words:
    """Splits text into words: runs of letters, marks and digits; each character where a script has no spaces.

    Compatibility forms are one (NFKC: full width, ligatures). `keep_case` keeps upper and lower case apart. `symbols`
    says what takes the place of punctuation and symbols: a `space`, so that `3+4` is `3 + 4`, or nothing (`delete`),
    so that `3+4` is `34`.
    """

    keep_case: bool = False
    symbols: Literal["space", "delete"] = "space"

    def __call__(self, text: str) -> list[str]:
        text = self.joined(text)
        return text.split() if text.isascii() else _WORD.findall(text)

    def joined(self, text: str) -> str:
        """The words with single spaces between them, none added in scripts without spaces; for a tokenizer."""
        text = unicodedata.normalize("NFKC", text)
        if not self.keep_case:
            # Folding can undo the form that was just made ("ΐ" becomes three code points), hence once more.
            text = unicodedata.normalize("NFKC", text.casefold())
        return " ".join(text.translate(_TABLES[self.symbols]).split())


class _Separators(dict[int, str]):
    """What `str.translate` puts for a code point, worked out when it is first met."""

    def __init__(self, symbol: str):
        super().__init__()
        self.symbol = symbol

    def __missing__(self, code: int) -> str:
        char = chr(code)
        match unicodedata.category(char)[0]:
            case "L" | "M" | "N":
                self[code] = char
            case "P" | "S":
                self[code] = self.symbol
            case _:     # spaces, controls, lone surrogates
                self[code] = " "
        return self[code]


_TABLES = {"space": _Separators(" "), "delete": _Separators("")}
