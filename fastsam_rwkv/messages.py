"""Parts of error messages that come from files or modules, shortened, because they may be of any length."""

from __future__ import annotations

from collections.abc import Sequence


def short(value: object, most: int = 80) -> str:
    """Return `str(value)` on one line, cut after `most` characters."""
    text = str(value)
    cut = " ".join(text[: most + 1].split())
    return cut if len(text) <= most else f"{cut[:most]}... ({len(text)} characters)"


def shown(value: object) -> str:
    """Return `short(repr(value))`, also of a value that Python does not print."""
    try:
        return short(repr(value))
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, or a deeply nested list
        return f"a very large {type(value).__name__}"


def listed(names: Sequence[object], most: int = 300) -> str:
    """Return the first ten names, as far as `most` characters reach, and the number of the others."""
    shown: list[str] = []
    for name in names[:10]:
        text = short(name)
        if shown and len(", ".join([*shown, text])) > most:
            break
        shown.append(text)
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
