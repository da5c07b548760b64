"""Arguments of what declares something: a misspelt one is an error of the declaration.

Python's own error for an unknown keyword is a TypeError, which says neither what was meant nor
where. This module knows nothing of what is declared. Pure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from types import FrameType
from typing import Final, ParamSpec, TypeVar

from conductor.errors import DefinitionInvalid, did_you_mean

P = ParamSpec("P")
T = TypeVar("T")

_BY_NAME: Final = frozenset({Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD})
_PACKAGE: Final = __name__.partition(".")[0]


def declares(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function refuse arguments that it does not have. Raises DefinitionInvalid, then.

    >>> @declares
    ... def make(*, payload: object = None) -> None: ...
    >>> make(paylod=int)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    conductor.errors.DefinitionInvalid: make at ... has no option 'paylod'; did you mean 'payload'?
    """
    written = signature(function)
    parameters = written.parameters.values()
    options = [each.name for each in parameters if each.kind in _BY_NAME and each.name != "self"]
    takes_all = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
    shown = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in options and not takes_all:
                meant = did_you_mean(name, options)
                raise DefinitionInvalid(
                    f"{shown} at {caller()} has no option {name!r}{meant}",
                    hint=f"Options: {', '.join(options)}.",
                )
        try:
            written.bind(*args, **kwargs)
        except TypeError as error:
            raise DefinitionInvalid(f"{shown} at {caller()}: {error}") from error
        return function(*args, **kwargs)

    return call


def check_type(what: str, value: object, types: tuple[type, ...], example: str) -> None:
    """Raise DefinitionInvalid for an argument of another type. A bool is no number.

    >>> check_type("priority of task 't'", "high", (int,), "priority=5")
    Traceback (most recent call last):
    conductor.errors.DefinitionInvalid: priority of task 't' is not int, but 'high'
    """
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join("None" if each is type(None) else each.__name__ for each in types)
        raise DefinitionInvalid(f"{what} is not {names}, but {value!r}", hint=f"Such as {example}.")


def caller() -> str:
    """Return where the application called this package (``file:line``), for messages."""
    frame = sys._getframe(1)  # noqa: SLF001 - inspect would read the source
    while _is_ours(frame) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == _PACKAGE
