"""Text that others chose, on its way into logs and tables."""

from __future__ import annotations

import functools

LONGEST = 200


def cleaned(text: str) -> str:
    """Cut short, and nothing in it that steers a terminal, breaks a line or isn't UTF-8."""
    text = text[:LONGEST]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


# Names of models, principals and addresses come again and again.
clean = functools.lru_cache(maxsize=4096)(cleaned)
