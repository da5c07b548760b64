"""What a handler says of itself against what it will be given: for people without a type checker.

A handler that takes other events than its triggers give, or another context, fails in every run.
Only what is written down and certainly wrong is refused: an annotation that cannot be read, or may
be meant otherwise, passes. What a decorator wraps takes and returns what the decorator likes, so of
a wrapped handler no event and no result is compared. This module must not call handlers.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Final, Never

from pydantic import BaseModel, RootModel

from conductor.annotations import (
    EMPTY,
    accepts,
    class_of,
    is_awaitable,
    members,
    returned,
    shown,
)
from conductor.batch_context import BatchContext
from conductor.context import Context
from conductor.definitions import Batch, TaskDefinition, Trigger
from conductor.errors import DefinitionInvalid
from conductor.sync_context import SyncContext

_MAX_LAYERS: Final = 50
_CONTEXTS: Final = (Context, SyncContext, BatchContext)
_POSITIONAL: Final = frozenset({
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
})  # fmt: skip
_AWAITABLE_TEXT: Final = re.compile(r"[\w.]*\b(Awaitable|Coroutine|Future|Task)\b")
_PLAIN: Final = (bool, bytes, float, int, list, set, str, tuple, type(None))


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler as it is written, its annotations evaluated: EMPTY where they cannot be.

    ``is_coroutine``: it, or what it wraps, is ``async def``, or it returns an awaitable;
    ``may_await``: what it returns may be one, for all that is known. ``is_wrapped``: a decorator
    has wrapped it.
    """

    task: str
    place: str
    event: Any
    context: Any
    returns: Any
    is_coroutine: bool
    may_await: bool
    is_wrapped: bool
    is_wrapper: bool
    is_generator: bool

    def refuse(self, why: str, hint: str) -> Never:
        """Raise DefinitionInvalid."""
        where = f" at {self.place}" if self.place else ""
        raise DefinitionInvalid(f"the handler of task {self.task!r}{where} {why}", hint=hint)


def read_handler(task: str, handler: Callable[..., Any]) -> Handler:
    """Return what a handler says. Raises DefinitionInvalid for one that cannot be called as one."""
    signature = _signature(task, handler)
    layers = list(_layers(handler))
    inner = layers[-1]
    code = getattr(inner, "__code__", None)
    is_wrapped = any(hasattr(layer, "__wrapped__") for layer in layers)
    event, context, returns = _annotations(inner if is_wrapped else signature, inner)
    is_coroutine = any(map(inspect.iscoroutinefunction, layers))
    result = returned(returns)
    return Handler(
        task=task,
        place="" if code is None else f"{code.co_filename}:{code.co_firstlineno}",
        event=EMPTY if is_wrapped else event,
        context=context,
        returns=EMPTY if is_wrapped or isinstance(result, str) else result,
        is_coroutine=is_coroutine or is_awaitable(returns) or _is_awaitable_text(returns),
        may_await=is_wrapped or returns is Any or isinstance(returns, str),
        is_wrapped=is_wrapped,
        is_generator=not is_wrapped
        and (inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner)),
        is_wrapper=is_coroutine and not inspect.iscoroutinefunction(_callable(handler)),
    )


def _signature(task: str, handler: Callable[..., Any]) -> inspect.Signature | None:
    """Return how a handler is called itself, whatever it wraps; None when nothing says."""
    try:
        signature = inspect.signature(handler, follow_wrapped=False)
        signature.bind("event", "context")
    except TypeError as error:
        raise DefinitionInvalid(
            f"the handler of task {task!r} cannot be called with an event and a context: {error}",
            hint="async def handler(event, ctx), or def for one that blocks.",
        ) from error
    except (NameError, ValueError):  # annotations for checkers alone; what is not Python
        return None
    return signature


def _annotations(source: Any, inner: Any) -> tuple[Any, Any, Any]:
    """Return those of the event, the context and the result; text of a result that is no type."""
    try:
        written = source if isinstance(source, inspect.Signature) else inspect.signature(source)
    except (NameError, TypeError, ValueError):
        return EMPTY, EMPTY, EMPTY
    parameters = [each for each in written.parameters.values() if each.kind in _POSITIONAL]
    event, context, *_ = (*(each.annotation for each in parameters), EMPTY, EMPTY)
    scope = _scope(inner)
    returns = _evaluate(written.return_annotation, inner, scope)
    return (
        _evaluate(event, inner, scope),
        _evaluate(context, inner, scope),
        written.return_annotation if returns is EMPTY else returns,
    )


def is_async(handler: Handler, batch: Batch | None) -> bool:
    """Return whether a handler runs on the event loop; else it runs in a thread.

    A wrapper (`functools.wraps`) is what it wraps, unless it takes the context of a thread. Raises
    DefinitionInvalid for a context that it will not be given.
    """
    context = class_of(handler.context)
    kind = next((k for k in _CONTEXTS if inspect.isclass(context) and issubclass(context, k)), None)
    is_other = kind is not None and (kind is BatchContext) != (batch is not None)
    if handler.is_generator:
        handler.refuse("yields, so that it would never run", "Return the result instead.")
    if kind is not None and is_other and not handler.is_wrapped:
        wanted = "BatchContext" if batch else "Context or SyncContext"
        handler.refuse(f"takes {kind.__name__}", f"It will be given {wanted}.")
    if kind is Context and not handler.is_coroutine and not handler.may_await:
        handler.refuse(
            "is def, and takes Context, which is for coroutines",
            "Make it async def, or take SyncContext.",
        )
    if kind is SyncContext and handler.is_wrapper:
        return False
    if kind is SyncContext and handler.is_coroutine:
        handler.refuse(
            "is async def, and takes SyncContext, which blocks",
            "Take Context, or make it def.",
        )
    return handler.is_coroutine or (kind is Context and not handler.is_wrapped)


def check_events(
    handler: Handler,
    definition: TaskDefinition[Any, Any],
    triggers: Sequence[Trigger[Any]],
    batch: Batch | None,
) -> None:
    """Raise DefinitionInvalid for a handler that does not take what its triggers give."""
    given = [(trigger, event) for trigger in triggers for event in trigger.gives(definition)]
    for trigger, event in given:
        one = event if batch is None else Sequence[event]  # type: ignore[valid-type]  # at run time
        if not accepts(handler.event, one):
            wanted = " | ".join(dict.fromkeys(shown(each) for _, each in given))
            handler.refuse(
                f"takes {shown(handler.event)}, and {trigger.name!r} gives {shown(one)}",
                f"Annotate the event with {wanted if batch is None else f'Sequence[{wanted}]'},"
                " or correct the triggers.",
            )


def check_result(handler: Handler, definition: TaskDefinition[Any, Any]) -> None:
    """Raise DefinitionInvalid for a handler that never returns what its task declares."""
    declared, returns = definition.returns, members(handler.returns)
    if handler.returns is EMPTY or any(accepts(declared.form, each) for each in returns):
        return
    if all(_cannot_become(each, declared.form) for each in returns) and declared.validates:
        what = "nothing" if declared.is_none else shown(declared.form)
        handler.refuse(
            f"returns {shown(handler.returns)}, and the task declares {what}",
            "Return what the definition's `returns` declares, or correct it.",
        )


def _cannot_become(returned: Any, declared: Any) -> bool:
    """Return whether no validation makes the one out of the other."""
    found = class_of(returned)
    if declared is None or declared is type(None) or found is type(None):
        return True
    if not inspect.isclass(found) or not _is_record(declared) or issubclass(declared, found):
        return False
    return found in _PLAIN or _is_record(found)


def _is_record(form: Any) -> bool:
    """Return whether a form is a model or dataclass, and takes no other object for its own."""
    if not inspect.isclass(form) or not (is_dataclass(form) or issubclass(form, BaseModel)):
        return False
    own: Any = getattr(form, "__get_pydantic_core_schema__", None)
    if issubclass(form, RootModel) or getattr(own, "__func__", None) is not _schema_of(form):
        return False
    decorators = getattr(form, "__pydantic_decorators__", None)
    config: Any = getattr(form, "model_config", {})
    return not (config.get("from_attributes") or (decorators and decorators.model_validators))


def _layers(handler: Any) -> Iterator[Any]:
    """Yield a handler and what it calls, as far as that is known, from without to within."""
    for _ in range(_MAX_LAYERS):
        if handler is None:
            return
        yield handler
        if isinstance(handler, partial):
            handler = handler.func
        elif hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif not inspect.isroutine(handler) and not inspect.isclass(handler):
            handler = getattr(type(handler), "__call__", None)  # noqa: B004 - its code
        else:
            handler = None


def _callable(handler: Any) -> Any:
    """Return what runs first when a handler is called."""
    while isinstance(handler, partial):
        handler = handler.func
    if inspect.isroutine(handler):
        return handler
    return getattr(type(handler), "__call__", None)  # noqa: B004 - its code


def _schema_of(form: type) -> Any:
    """Return the function that makes the schema of a form, unless it has one of its own."""
    model: Any = BaseModel
    return model.__get_pydantic_core_schema__.__func__ if issubclass(form, BaseModel) else None


def _is_awaitable_text(annotation: Any) -> bool:
    """Return whether text that cannot be read (its names are for checkers alone) says awaitable."""
    return isinstance(annotation, str) and _AWAITABLE_TEXT.match(annotation) is not None


def _scope(function: Any) -> Mapping[str, Any] | None:
    """Return the names around a function that are not its module's; None when they are not known.

    A function within another sees that one's names, which only its frame has; one of a class those
    of the class.
    """
    names = getattr(function, "__qualname__", "").split(".")[:-1]
    if not names:
        return {}
    code, frame = getattr(function, "__code__", None), sys._getframe()  # noqa: SLF001 - see above
    while code is not None and frame.f_back is not None:
        frame = frame.f_back
        if code in frame.f_code.co_consts:
            return {**frame.f_locals}
    owner: Any = None
    space = getattr(function, "__globals__", {})
    for name in names:
        owner = space.get(name)
        space = vars(owner) if inspect.isclass(owner) else {}
    return {**space} if inspect.isclass(owner) else None


def _evaluate(annotation: Any, function: Any, scope: Mapping[str, Any] | None) -> Any:
    """Return what an annotation says; EMPTY when it has names that are not defined there."""
    if not isinstance(annotation, str):
        return annotation
    if scope is None:
        return EMPTY
    try:
        return eval(annotation, getattr(function, "__globals__", {}), {**scope})  # noqa: S307 - the application's own code, as inspect does
    except Exception:  # noqa: BLE001 - a name for checkers alone, or whatever else it is
        return EMPTY
