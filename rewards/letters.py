"""Letters of texts: which are foreign to what reads them."""

from __future__ import annotations

import unicodedata


def foreign(text: str) -> list[str]:
    """Return the letters of a text that are not Latin, each once; accents, Vietnamese ones too, and full width are Latin.

    Examples:
        >>> foreign("Caf\u00e9 Vi\u1ec7t 5 \u00b5m"), foreign("\u5f00\u95e8 open \u5f00")
        ([], ['\u5f00', '\u95e8'])
    """
    # The sign of micro has no script of its own in its name.
    return list(dict.fromkeys(letter for letter in text if letter.isalpha() and ord(letter) > 0x24F and not _is_latin(letter)))


def _is_latin(letter: str) -> bool:
    return "LATIN" in unicodedata.name(letter, "").split()
