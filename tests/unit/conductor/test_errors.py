from __future__ import annotations

import inspect

import pytest

import conductor.errors
from conductor.errors import ConductorError, Retry, UnknownTask

CLASSES = [
    member
    for _, member in inspect.getmembers(conductor.errors, inspect.isclass)
    if issubclass(member, ConductorError)
]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_says_whether_to_try_again_and_is_explained(
    error: type[ConductorError],
) -> None:
    assert isinstance(error.retry, Retry)
    assert isinstance(error.hint, str)
    assert error.__doc__


def test_an_unknown_name_names_the_nearest() -> None:
    error = UnknownTask("send-emial", ["send-email", "receipt", "send-mail"])
    assert error.nearest[0] == "send-email"
    assert "did you mean 'send-email'" in str(error)
    assert "did you mean" not in str(UnknownTask("x", []))


def test_a_hint_can_be_given() -> None:
    assert ConductorError("a", hint="b").hint == "b"
    assert ConductorError("a").hint == ""
