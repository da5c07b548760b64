from __future__ import annotations

import json
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from traceback import format_exception
from typing import Any
from urllib.error import HTTPError

import psycopg
import pytest
from pydantic import BaseModel, ValidationError

from conductor.errors import ChildFailed, NonRetryable, StepFailed
from conductor.failures import describe, restore


class DeclinedError(Exception):
    def __init__(self, code: int, *, card: object = None) -> None:
        super().__init__(f"declined with {code}")
        self.code, self.card = code, card


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class Order(BaseModel):
    id: int


def again(error: Exception) -> Exception:
    return restore("pay", describe(error))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1, None, 2.5, ["b", {"c": True}]),
        KeyError("k"),
        FileNotFoundError(2, "no such file"),
        TimeoutError(),
        NonRetryable("the card was refused"),
        psycopg.errors.UniqueViolation("twice"),
        json.JSONDecodeError("bad", "{", 0),
    ],
)
def test_the_same_error_comes_back(error: Exception) -> None:
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.args) == (str(error), error.args)
    assert found.__notes__ == [
        "Step 'pay' failed so in an earlier run, which the handler went on from."
    ]


def test_attributes_come_back_that_are_plain() -> None:
    """Also where its ``__init__`` wants something else than its arguments."""
    found = again(DeclinedError(51, card=object()))
    assert isinstance(found, DeclinedError)
    assert (found.code, str(found)) == (51, "declined with 51")
    assert not hasattr(found, "card")


def test_an_error_of_ours_that_is_made_of_others() -> None:
    found = again(ChildFailed(7, {"type": "ValueError", "message": "no"}))
    assert isinstance(found, ChildFailed)
    assert (found.job, found.error["type"]) == (7, "ValueError")


def _local() -> Exception:
    class LocalError(Exception): ...

    return LocalError("here")


def _other() -> Exception:
    kind = type("GoneError", (Exception,), {"__module__": "nowhere"})
    error: Exception = kind("nowhere")
    return error


class AnsweredError(Exception):
    def __init__(self, response: object) -> None:
        self.response = response

    def __str__(self) -> str:
        return f"answered {self.response!r}"


class ManyError(ExceptionGroup[Exception]): ...


def raised(kind: type[Exception], fails: Callable[[], object]) -> Exception:
    with pytest.raises(kind) as caught:
        fails()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        raised(FileNotFoundError, Path("/there/is/none").read_text),
        raised(FileNotFoundError, lambda: Path("/there/is/none").rename("/neither")),
        raised(UnicodeDecodeError, b"\xff".decode),
        AnsweredError({1, 2}),
        HTTPError("http://there", 404, "not found", Message(), None),
    ],
)
def test_an_error_is_caught_as_before_and_says_the_same(error: Exception) -> None:
    """Also where its arguments do not say all of it."""
    found = again(error)
    assert isinstance(found, type(error))
    assert str(found) == str(error)
    if isinstance(error, FileNotFoundError):
        assert isinstance(found, FileNotFoundError)
        assert (found.filename, found.filename2) == (error.filename, error.filename2)
    assert "".join(format_exception(found)).endswith("which the handler went on from.\n")


def test_an_error_that_cannot_be_shown_is_caught_as_before() -> None:
    assert isinstance(again(UnshowableError("x")), UnshowableError)


@pytest.mark.parametrize("kind", [ExceptionGroup, ManyError])
def test_a_group_is_made_of_what_was_in_it(kind: type[ExceptionGroup[Exception]]) -> None:
    several = kind("several", [KeyError("a"), ExceptionGroup("inner", [_local()])])
    found = again(several)
    assert isinstance(found, kind)
    assert str(found) == str(several)
    key, inner = found.exceptions
    assert (type(key), key.args) == (KeyError, ("a",))
    assert isinstance(inner, ExceptionGroup)
    assert isinstance(inner.exceptions[0], StepFailed)


def test_pydantic_s_errors_come_back() -> None:
    error = raised(ValidationError, lambda: Order(id="{x}"))
    found = again(error)
    assert isinstance(error, ValidationError)
    assert isinstance(found, ValidationError)
    assert found.title == "Order"
    assert found.errors(include_url=False) == error.errors(include_url=False)


@pytest.mark.parametrize(
    "error, message",
    [
        (_local(), "step 'pay' has failed: test_failures:_local.<locals>.LocalError: here"),
        (_other(), "nowhere"),
    ],
)
def test_what_cannot_be_made_again_is_described(error: Exception, message: str) -> None:
    found = again(error)
    assert isinstance(found, StepFailed)
    assert message.rpartition(":")[2] in str(found)


@pytest.mark.parametrize(
    "name", ["builtins:print", "builtins:SystemExit", "nowhere:Error", "os:system", "builtins:", ""]
)
def test_nothing_but_an_exception_is_made(name: str) -> None:
    kept = {"type": name, "message": "m", "args": ["echo"], "fields": {}}
    assert isinstance(restore("pay", json.dumps(kept).encode()), StepFailed)


@pytest.mark.parametrize("text", ["nul \0", "half \ud800"])
def test_what_the_database_cannot_hold_is_left_out(text: str) -> None:
    error: Any = ValueError(text)
    error.more = text
    assert b"\\u0000" not in describe(error)
    assert not hasattr(again(error), "more")
