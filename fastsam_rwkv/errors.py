"""Errors that the caller can fix: an image, a prompt, a model file or a device that cannot be used."""

from __future__ import annotations


class InputError(Exception):
    """Base of all errors below: what the caller gave cannot be used. The message names the value and the remedy."""


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
