"""Errors that the caller can fix: an image, a prompt, a model file or a device that cannot be used."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

LONGEST_MESSAGE = 480  # characters; a name from a file or a value may have millions
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 120


class InputError(Exception):
    """Base of all errors below: what the caller gave cannot be used. The message names the value and the remedy.

    A longer message than 480 characters loses its middle.

    Args:
        message: The value and, for a caller in Python, the remedy.
        command_message: The same for a user of the command, if the remedy is another.

    Attributes:
        command_message: Message for a user of the command.
    """

    def __init__(self, message: str = "", command_message: str | None = None) -> None:
        super().__init__(shorten(message))
        self.command_message = shorten(message if command_message is None else command_message)


def shorten(value: object, longest: int = LONGEST_MESSAGE) -> str:
    """Return `str(value)` without its middle if it has more than `longest` characters."""
    text = str(value)
    tail = longest // 3
    return text if len(text) <= longest else f"{text[: longest - tail - 5]} ... {text[-tail:]}"


def short_repr(value: object) -> str:
    """Return the repr of any value in at most 200 characters, without formatting all of a long one."""
    try:
        return shorten(_VALUES.repr(value), 200)
    except Exception:  # of a value's own repr, or an int of more digits than Python prints
        return f"<{type(value).__name__}>"


def listed(names: Sequence[object], longest: int = 300) -> str:
    """Return the first ten names, as far as `longest` characters reach, and the number of the others."""
    some: list[str] = []
    for name in names[:10]:
        text = " ".join(shorten(name, 200).split())
        if some and len(", ".join([*some, text])) > longest:
            break
        some.append(text)
    rest = len(names) - len(some)
    return ", ".join(some) + (f" and {rest} more" if rest else "")


class ArgumentError(InputError, ValueError):
    """Command-line arguments that do not go together, or an output file that cannot be written."""


class ImageError(InputError, ValueError):
    """An image that cannot be decoded, or whose shape or values are not those of an image."""


class PromptError(InputError, ValueError):
    """Points, boxes, masks or options that do not fit each other, the image or the model."""


class CheckpointError(InputError, ValueError):
    """Files that are not a model this release can load."""


class DeviceError(InputError, ValueError):
    """A device or dtype that PyTorch cannot use on this machine."""


class HubError(InputError, OSError):
    """A model that cannot be fetched: no such model, no access, no connection, or no room in the cache."""
