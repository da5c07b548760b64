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
    """Make a function refuse keywords that it does not have. Raises DefinitionInvalid, then.

    >>> @declares
    ... def make(*, payload: object = None) -> None: ...
    >>> make(paylod=int)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    conductor.errors.DefinitionInvalid: make at ... has no option 'paylod'; did you mean 'payload'?
    """
    parameters = signature(function).parameters.values()
    options = [each.name for each in parameters if each.kind in _BY_NAME and each.name != "self"]
    shown = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in options:
                meant = did_you_mean(name, options)
                raise DefinitionInvalid(
                    f"{shown} at {caller()} has no option {name!r}{meant}",
                    hint=f"Options: {', '.join(options)}.",
                )
        return function(*args, **kwargs)

    return call


def caller() -> str:
    """Return where the application called this package (``file:line``), for messages."""
    frame = sys._getframe(1)  # noqa: SLF001 - inspect would read the source
    while _is_ours(frame) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == _PACKAGE
