import pickle

import pytest

import fastsam_rwkv
from fastsam_rwkv.errors import ArgumentError, short_repr, shorten
from fastsam_rwkv.export.manifest import ExportError

ERRORS = [ArgumentError, ExportError] + [
    getattr(fastsam_rwkv, name) for name in fastsam_rwkv.__all__ if name.endswith("Error")
]


@pytest.mark.parametrize("error", ERRORS)
def test_messages_are_short_and_survive_pickling(error):
    raised = error(f"name {'x' * 1_000_000!r} is wrong; rename it", "use --name")
    for one in (raised, pickle.loads(pickle.dumps(raised))):
        assert len(str(one)) < 500 and str(one).startswith("name 'xxx") and str(one).endswith("is wrong; rename it")
        assert one.command_message == "use --name"
    assert error("short").command_message == str(error("short")) == "short"


def test_shorten_keeps_both_ends():
    assert shorten("x" * 480) == "x" * 480
    assert shorten("a" * 300 + "b" * 300, 100) == "a" * 62 + " ... " + "b" * 33


class Unprintable:
    def __repr__(self):
        raise KeyError


@pytest.mark.parametrize(
    "value, start",
    [
        ([3, 4], "[3, 4]"),
        ("never", "'never'"),
        (list(range(1_000_000)), "[0, 1, 2"),
        ([["x" * 1_000] * 1_000] * 1_000, "[['xxx"),
        ("y" * 10_000_000, "'yyy"),
        (10**10_000, "<int>"),
        (Unprintable(), "<Unprintable instance"),
    ],
    ids=["few", "text", "long", "nested", "wide", "digits", "unprintable"],
)
def test_any_value_has_a_short_repr(value, start):
    text = short_repr(value)
    assert text.startswith(start) and len(text) <= 200
