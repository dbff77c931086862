"""Text that others chose, on its way into logs and tables."""

from __future__ import annotations

import functools

from gateway.logs import without_keys

LONGEST = 200
_MARGIN = 200  # half a key at the cut would not be seen to be one


def cleaned(text: str) -> str:
    """Cut short, without keys (some paste theirs where a name is due) and what steers a terminal or breaks a line."""
    text = without_keys(text[: LONGEST + _MARGIN])[:LONGEST]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


_kept = functools.lru_cache(maxsize=4096)(cleaned)


def clean(text: str) -> str:
    """`cleaned`, for names of models, principals and addresses, which come again and again."""
    return _kept(text[: LONGEST + _MARGIN])  # what is kept is short too
