"""Text from data as a terminal may be shown it: nothing in it can steer the terminal.

It knows characters. How things are laid out and coloured is for those who show them.
"""

from __future__ import annotations

import unicodedata

# Control and format characters (C0, C1, bidirectional overrides, zero-width ones), lone surrogates,
# private use, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def neutral(text: str) -> str:
    """The text with everything that could steer a terminal written out: `\\x1b`, `\\u202e`, …

    Newlines stay. Whatever of a text from data, a file or a server goes to a terminal goes through
    here; a rich `Text` made of it takes no markup either.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in _UNPRINTABLE
        else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )  # fmt: skip
