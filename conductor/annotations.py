"""Whether a value of one type can be given where an annotation stands, as far as that is certain.

What a type checker would know is not known here: whatever is not plainly wrong is accepted. Pure.
"""

from __future__ import annotations

import collections.abc
import inspect
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NewType, Union, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import is_typeddict

from conductor.events import Change

EMPTY: Final = inspect.Parameter.empty
"""An annotation that is not there, or cannot be read."""

_UNIONS: Final = frozenset({Union, UnionType})
_PROMOTED: Final[dict[Any, tuple[type, ...]]] = {
    bytes: (bytearray, memoryview),
    complex: (float, int),
    float: (int,),
}
_LISTS: Final = frozenset({list, tuple})


def accepts(wanted: Any, given: Any) -> bool:
    """Return False if a value of the type ``given`` is certainly none of ``wanted``.

    >>> accepts(int | str, bool), accepts(list[int], list[str]), accepts("Unknown", int)
    (True, False, True)
    """
    wanted, given = _plain(wanted), _plain(given)
    parts, choices = members(given), members(wanted)
    if len(parts) > 1:
        return all(accepts(wanted, part) for part in parts)
    if len(choices) > 1:
        return any(accepts(choice, given) for choice in choices)
    if get_origin(given) is Literal and get_origin(wanted) is not Literal:
        return all(accepts(wanted, type(value)) for value in get_args(given))
    found, known = class_of(given), class_of(wanted)
    if Any in {found, known} or not inspect.isclass(found) or not inspect.isclass(known):
        return True
    if _stands_for_others(found) or _stands_for_others(known):
        return True
    if is_typeddict(found) and is_typeddict(known):
        return known.__annotations__.keys() <= found.__annotations__.keys()
    if known in _LISTS and found is collections.abc.Sequence:
        known = collections.abc.Sequence
    return _is_a(found, known) and _accepts_arguments(wanted, given)


def _is_a(found: type, known: type) -> bool:
    try:
        is_a = issubclass(found, known)
    except TypeError:  # a protocol, say
        return True
    return (
        is_a
        or known is collections.abc.Hashable  # what forbids hashing is known at run time alone
        or issubclass(found, _PROMOTED.get(known, ()))
        or found.__qualname__ == known.__qualname__  # its module was imported twice, maybe
        or (_generic(known) is not None and issubclass(found, _generic(known)))
    )


def _stands_for_others(found: type) -> bool:
    """Return whether values are of another class: pydantic's ``EmailStr`` are ``str``."""
    return found.__bases__ == (object,) and "__get_pydantic_core_schema__" in vars(found)


def _generic(model: type) -> Any:
    """Return the model that a model with parameters is of."""
    if not issubclass(model, BaseModel):
        return None
    return model.__pydantic_generic_metadata__["origin"]


def _accepts_arguments(wanted: Any, given: Any) -> bool:
    """Return whether parameters fit, where they mean the same: of one class, or of our own."""
    ours, theirs, found = get_args(wanted), get_args(given), class_of(given)
    is_alike = found in {class_of(wanted), collections.abc.Sequence} or issubclass(found, Change)
    return not is_alike or len(ours) != len(theirs) or all(map(accepts, ours, theirs))


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, and of unions in it; of anything else itself.

    >>> members(Annotated[int | None, "note"])
    (<class 'int'>, <class 'NoneType'>)
    """
    plain = _plain(annotation)
    if get_origin(plain) not in _UNIONS:
        return (plain,)
    return tuple(member for each in get_args(plain) for member in members(each))


def class_of(annotation: Any) -> Any:
    """Return the class that an annotation names, without parameters; else what is written."""
    plain = _plain(annotation)
    if plain is EMPTY:
        return None
    return get_origin(plain) or plain


def returned(annotation: Any) -> Any:
    """Return what an awaitable gives; of anything else itself."""
    if not is_awaitable(annotation):
        return annotation
    arguments = get_args(annotation)
    return arguments[-1] if arguments else EMPTY


def is_awaitable(annotation: Any) -> bool:
    """Return whether values can be awaited.

    >>> is_awaitable(collections.abc.Coroutine[Any, Any, int]), is_awaitable(int)
    (True, False)
    """
    found = class_of(annotation)
    return inspect.isclass(found) and issubclass(found, collections.abc.Awaitable)


def shown(annotation: Any) -> str:
    """Return an annotation as one would write it.

    >>> shown(dict[str, int] | None)
    'dict[str, int] | None'
    """
    if annotation is NoneType or annotation is None:
        return "None"
    parts = members(annotation)
    if len(parts) > 1:
        return " | ".join(map(shown, parts))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if inspect.isclass(annotation) and not arguments:
        return annotation.__name__
    if origin in {None, Annotated, Literal} or not arguments:
        return str(annotation).replace("typing.", "")
    return f"{origin.__name__}[{', '.join(map(shown, arguments))}]"


def _plain(annotation: Any) -> Any:
    """Return an annotation without what says nothing of a value's class."""
    if annotation is None:
        return NoneType
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if isinstance(annotation, NewType):
        return _plain(annotation.__supertype__)
    return annotation
