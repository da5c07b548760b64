"""Filters that cannot be meant: a comparison with what a column never is, a result that is no bool.

The library tells nothing of an expression's types, so only plain shapes are judged: a column or a
literal next to a comparison, ``&&``, ``||``, ``!`` or ``?``, or as the whole. What a value may be
comes from a JSON schema, and whatever is not certain passes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Final,
    NamedTuple,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    BeforeValidator,
    PlainSerializer,
    PlainValidator,
    WrapSerializer,
    WrapValidator,
)

from conductor.errors import FilterInvalid
from conductor.filters import MACROS, MAPS, Filter, evaluate, tokens_of
from conductor.values import shape_of

Kinds: TypeAlias = frozenset[str]
"""What a value may be: number, numeral (a number as text), text, bool, null, bytes."""

_OF_SCHEMA: Final[Mapping[str, Kinds]] = {
    # a column of numeric is text, whatever its model says
    "integer": frozenset({"number", "numeral"}),
    "number": frozenset({"number", "numeral"}),
    "string": frozenset({"text", "numeral"}),
    # pydantic takes 1 and "t" for true
    "boolean": frozenset({"bool", "number", "numeral", "text"}),
    "null": frozenset({"null"}),
}
_OF_SHAPE: Final[Mapping[str, Kinds]] = {
    "bool": frozenset({"bool"}),
    "float": frozenset({"number", "numeral"}),
    "number": frozenset({"number"}),
    "text": frozenset({"text", "numeral"}),
}
_CONVERTERS: Final = (
    BeforeValidator, PlainSerializer, PlainValidator, WrapSerializer, WrapValidator,
)  # fmt: skip
_NAMES: Final = {"bool": "a bool", "bytes": "bytes", "null": "null", "number": "a number"}
_ORDERS: Final = frozenset({"<", "<=", ">", ">="})
_COMPARISONS: Final = _ORDERS | {"==", "!="}
_LOGICAL: Final = frozenset({"&&", "||"})
_OPENS: Final = frozenset({"", "(", "[", ",", "?", ":"}) | _LOGICAL
_CLOSES: Final = frozenset({"", ")", "]", ",", "?", ":"}) | _LOGICAL
_OF_TEXT: Final = frozenset({"contains", "endsWith", "matches", "startsWith"})
_OF_TIMES: Final = frozenset({
    "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours",
    "getMilliseconds", "getMinutes", "getMonth", "getSeconds",
})  # fmt: skip
_HINT: Final = "Numeric and times are text: double(new.price) > 9.5, timestamp(new.at) > …"


class _Operand(NamedTuple):
    """A column or a literal: as it is written, what it may be, and where it ends."""

    text: str
    kinds: Kinds | None
    end: int
    is_column: bool


def certain(form: Any, kinds: Mapping[str, Kinds]) -> dict[str, Kinds]:
    """Return those members whose values pass no function that takes or gives others too."""
    model = _model(form)
    if _has_converter(form):
        return {}
    decorators = getattr(model, "__pydantic_decorators__", None)
    config: Mapping[str, Any] = getattr(model, "model_config", {})
    converted: set[str] = set()
    if decorators is not None:
        checks = (*decorators.model_validators.values(), *decorators.root_validators.values())
        is_open = config.get("coerce_numbers_to_str") or config.get("json_encoders")
        if is_open or decorators.model_serializers or any(_converts(c.info) for c in checks):
            return {}
        converted = {
            field
            for check in (
                *decorators.field_validators.values(),
                *decorators.validators.values(),
                *decorators.field_serializers.values(),
            )
            for field in check.info.fields
            if _converts(check.info)
        }
    if "*" in converted:
        return {}
    found = dict(kinds)
    for field, (names, parts) in _fields(model).items():
        if field in converted or any(map(_has_converter, parts)):
            for name in names:
                found.pop(str(name), None)
    return found


def _model(form: Any) -> Any:
    """Return the class that a form is of, or what else it is."""
    while get_origin(form) is Annotated or hasattr(form, "__value__"):
        form = get_args(form)[0] if get_origin(form) is Annotated else form.__value__
    return get_origin(form) or form


def _fields(model: Any) -> dict[str, tuple[Sequence[Any], Sequence[Any]]]:
    """Return the names of each field in JSON, and where its functions may be."""
    fields: Mapping[str, Any] = (
        getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", None) or {}
    )
    if fields:
        return {
            field: (
                (field, info.alias, info.validation_alias, info.serialization_alias),
                (info.annotation, *info.metadata),
            )
            for field, info in fields.items()
        }
    try:
        hints = get_type_hints(model, include_extras=True)
    except (NameError, TypeError):
        return {}
    return {field: ((field,), (hint,)) for field, hint in hints.items()}


def _converts(check: Any) -> bool:
    return getattr(check, "mode", "before") != "after"


def _has_converter(annotation: Any, aliases: tuple[Any, ...] = ()) -> bool:
    """Return whether values pass a function before they are what the annotation says, or after."""
    if isinstance(annotation, _CONVERTERS):
        return True
    parts = get_args(annotation)
    if hasattr(annotation, "__value__") and annotation not in aliases:  # may hold itself
        parts, aliases = (annotation.__value__,), (*aliases, annotation)
    return any(_has_converter(part, aliases) for part in parts)


def kinds_of(schema: Mapping[str, Any] | None) -> dict[str, Kinds]:
    """Return what the members of a JSON object may be, by name, as far as its schema is certain.

    >>> list(kinds_of({"properties": {"age": {"type": "integer"}, "tags": {"type": "array"}}}))
    ['age']
    """
    schema = schema or {}
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    members = _resolved(schema, definitions).get("properties", {})
    found = {name: _kinds(member, definitions) for name, member in members.items()}
    return {name: kinds for name, kinds in found.items() if kinds is not None}


def _kinds(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Kinds | None:
    schema = _resolved(schema, definitions)
    if "anyOf" in schema:
        parts = [_kinds(part, definitions) for part in schema["anyOf"]]
        return None if None in parts else frozenset().union(*filter(None, parts))
    if "contentMediaType" in schema or "contentSchema" in schema:  # JSON, which may be anything
        return None
    name = schema.get("type")
    return _OF_SCHEMA.get(name) if isinstance(name, str) else None


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = definitions.get(schema["$ref"].rpartition("/")[2], {})
    return schema


def kinds_of_type(type_oid: int) -> Kinds | None:
    """Return what a column of a type may be for a filter; None (as for 0): whatever it is."""
    return _OF_SHAPE.get(shape_of(type_oid)) if type_oid else None


def check_operands(found: Filter, kinds: Mapping[str, Kinds]) -> None:
    """Raise FilterInvalid for what fails or never holds, and for what is no condition."""
    tokens = _tokens(found.source)
    if not _shadows(tokens):
        _Reading(found.source, tokens, kinds).check()


class _Reading:
    """One expression while it is checked."""

    def __init__(self, source: str, tokens: Sequence[str], kinds: Mapping[str, Kinds]) -> None:
        self._source = source
        self._tokens = tokens
        self._kinds = kinds

    def check(self) -> None:
        """Look at every operand."""
        first, last = _outer(self._tokens)
        for start in range(len(self._tokens)):
            before = self._at(start - 1)
            operand = self._operand(start)
            if operand is not None and before != ".":
                self._called(operand)
            if operand is None or before not in _OPENS | {"!"}:
                continue
            after = self._at(operand.end)
            if after in _COMPARISONS and before != "!":
                self._compare(operand, after)
            elif after in _CLOSES:
                is_whole = (start, operand.end) == (first, last)
                if is_whole or before in _LOGICAL | {"!"} or after in _LOGICAL | {"?"}:
                    self._condition(operand)

    def _compare(self, left: _Operand, operator: str) -> None:
        right = self._operand(left.end + 1)
        if right is None or self._at(right.end) not in _CLOSES:
            return
        if left.is_column == right.is_column or left.kinds is None or right.kinds is None:
            return
        column, literal = (left, right) if left.is_column else (right, left)
        assert column.kinds is not None  # noqa: S101 - neither is
        assert literal.kinds is not None  # noqa: S101 - neither is
        is_null = literal.kinds == {"null"}
        if (is_null and operator in _ORDERS) or not (is_null or column.kinds & literal.kinds):
            raise FilterInvalid(
                f"filter {self._source!r}: {column.text} is {_shown(column.kinds)}, and"
                f" {operator} compares it with {literal.text}",
                hint=_HINT,
            )

    def _called(self, operand: _Operand) -> None:
        """Refuse a method that a column's values do not have."""
        dot, name, bracket = (self._at(operand.end + offset) for offset in range(3))
        if (dot, bracket) != (".", "(") or operand.kinds is None or not operand.is_column:
            return
        is_time = name in _OF_TIMES
        if is_time or (name in _OF_TEXT and not operand.kinds & {"numeral", "text"}):
            hint = f"timestamp({operand.text}).{name}()" if is_time else f"string({operand.text})"
            raise FilterInvalid(
                f"filter {self._source!r}: {operand.text} is {_shown(operand.kinds)}, which has no"
                f" {name}()",
                hint=f"Such as {hint}.",
            )

    def _condition(self, operand: _Operand) -> None:
        if operand.kinds is not None and "bool" not in operand.kinds:
            raise FilterInvalid(
                f"filter {self._source!r}: {operand.text} is {_shown(operand.kinds)}, not a"
                " condition",
                hint=f"Compare it, such as {operand.text} != null.",
            )

    def _at(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else ""

    def _operand(self, start: int) -> _Operand | None:
        text = self._at(start)
        if text in MAPS:
            return self._column(start)
        sign = "-" if text == "-" and self._at(start + 1)[:1].isdigit() else ""
        literal = self._at(start + 1) if sign else text
        kinds = _kinds_of_literal(literal)
        end = start + 1 + len(sign)
        return None if kinds is None else _Operand(sign + literal, kinds, end, is_column=False)

    def _column(self, start: int) -> _Operand | None:
        dot, name, after = (self._at(start + offset) for offset in (1, 2, 3))
        if dot == "." and name.isidentifier() and after != "(":
            column, end = name, start + 3
        elif dot == "[" and _is_text(name) and after == "]":
            column, end = str(evaluate(name)), start + 4
        else:
            return None
        text = "".join(self._tokens[start:end])
        return _Operand(text, self._kinds.get(column), end, is_column=True)


def _kinds_of_literal(text: str) -> Kinds | None:
    if text in {"true", "false"}:
        return frozenset({"bool"})
    if text == "null":
        return frozenset({"null"})
    if text[:1].isdigit():
        return frozenset({"number"})
    if not _is_text(text):
        return None
    value = evaluate(text)
    if not isinstance(value, str):
        return frozenset({"bytes"})
    return frozenset({"numeral" if _is_numeral(value) else "text"})


def _is_text(token: str) -> bool:
    return token[-1:] in {'"', "'"}


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(kinds: Kinds) -> str:
    if "number" in kinds:
        return "a number"
    names = [_NAMES[kind] for kind in sorted(kinds - {"null", "numeral", "text"})]
    return "text" if kinds & {"numeral", "text"} else " or ".join(names) or "null"


def _tokens(source: str) -> list[str]:
    """Return the tokens of an expression, operators of two characters as one."""
    tokens: list[str] = []
    for _, text in tokens_of(source):
        if tokens and tokens[-1] + text in _COMPARISONS | _LOGICAL:
            tokens[-1] += text
        else:
            tokens.append(text)
    return tokens


def _shadows(tokens: Sequence[str]) -> bool:
    """Return whether a macro binds the name of a map."""
    return any(
        macro in MACROS and bracket == "(" and name in MAPS
        for macro, bracket, name in zip(tokens, tokens[1:], tokens[2:], strict=False)
    )


def _outer(tokens: Sequence[str]) -> tuple[int, int]:
    """Return where the expression begins and ends without the brackets around all of it."""
    first, last = 0, len(tokens)
    while last - first > 1 and _closing(tokens, first) == last - 1:
        first, last = first + 1, last - 1
    return first, last


def _closing(tokens: Sequence[str], opening: int) -> int | None:
    """Return where the bracket that opens here is closed."""
    depth = 0
    for index, text in enumerate(tokens[opening:], opening):
        depth += {"(": 1, ")": -1}.get(text, 0)
        if depth == 0:
            return index if tokens[opening] == "(" else None
    return None
