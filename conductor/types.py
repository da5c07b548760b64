"""Types of columns for row models: what the router sends of a value, as a Python object.

Generated row models use them, handwritten ones may. A type reads the JSON of a change and the
server's text, which elements of enum arrays, composites and ranges are. Nothing is lost: what
Python's dates cannot hold (infinity, BC, years beyond 9999, 24:00) keeps its text. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, tzinfo
from decimal import Decimal
from typing import Annotated, Any, Final, Generic, TypeAlias, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    PlainSerializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema, from_json, to_json

from conductor.literals import (
    Bounds,
    is_vector,
    parse_array,
    parse_multirange,
    parse_range,
    parse_record,
    quote_bound,
)

T = TypeVar("T")

_BEYOND: Final = re.compile(r"-?infinity|\d{5,}-.*|.* BC")
_MIDNIGHT: Final = re.compile(r"24:00:00(?:\.0+)?(.*)")


def Column(name: str) -> Any:  # noqa: N802 - reads as pydantic's Field does
    """Say which column a field of a row model is, when its name cannot be the field's.

    class Users(TableRow, table="public.users"):
        class_: Annotated[str, Column("class")]
    """
    return Field(validation_alias=name, serialization_alias=name)


# --- dates and times -------------------------------------------------------------------------


class OutOfRange:
    """A date or time that Python cannot hold: the nearest it can, and PostgreSQL's ``text``.

    It orders as that nearest value does, and equals only a value of the same text.
    """

    text: str

    def __eq__(self, other: object) -> bool:
        """Return whether the other has this text too."""
        return isinstance(other, type(self)) and other.text == self.text

    def __ne__(self, other: object) -> bool:
        """Return whether the other has another text: the base class would compare the nearest."""
        return not self == other

    def __hash__(self) -> int:
        """Return the hash of the text."""
        return hash(self.text)

    def __repr__(self) -> str:
        """Return the class and the text."""
        return f"{type(self).__name__}({self.text!r})"

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class DatetimeOutOfRange(OutOfRange, datetime):
    """A timestamp that is infinite, BC or beyond the year 9999."""

    @classmethod
    def of(cls, text: str, zone: tzinfo | None) -> DatetimeOutOfRange:
        """Return the value of this text."""
        day, moment = (date.min, time.min) if _is_early(text) else (date.max, time.max)
        found = cls.combine(day, moment, zone)
        found.text = text
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the text."""
        return type(self).of, (self.text, self.tzinfo)


class DateOutOfRange(OutOfRange, date):
    """A date that is infinite, BC or beyond the year 9999."""

    @classmethod
    def of(cls, text: str) -> DateOutOfRange:
        """Return the value of this text."""
        found = cls.fromordinal((date.min if _is_early(text) else date.max).toordinal())
        found.text = text
        return found

    def __reduce__(self) -> Any:
        """Copy and pickle by the text."""
        return type(self).of, (self.text,)


class TimeOutOfRange(OutOfRange, time):
    """The end of the day, 24:00."""

    @classmethod
    def of(cls, text: str, zone: tzinfo | None) -> TimeOutOfRange:
        """Return the value of this text."""
        found = cls(23, 59, 59, 999999, zone)
        found.text = text
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the text."""
        return type(self).of, (self.text, self.tzinfo)


def _is_early(text: str) -> bool:
    return text.startswith("-") or text.endswith("BC")


def _datetime(zone: tzinfo | None) -> Callable[[str], datetime]:
    def read(text: str) -> datetime:
        if _BEYOND.fullmatch(text):
            return DatetimeOutOfRange.of(text, zone)
        return datetime.fromisoformat(text)

    return read


def _date(text: str) -> date:
    return DateOutOfRange.of(text) if _BEYOND.fullmatch(text) else date.fromisoformat(text)


def _time(text: str) -> time:
    end_of_day = _MIDNIGHT.fullmatch(text)
    if end_of_day is None:
        return time.fromisoformat(text)
    zone = time.fromisoformat(f"00:00:00{end_of_day[1]}").tzinfo
    return TimeOutOfRange.of(text, zone)


@dataclass(frozen=True, slots=True)
class _OrText:
    """Marks a date or time type: what pydantic refuses is read from PostgreSQL's text."""

    read: Callable[[str], Any]
    name: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.union_schema(
            [handler(source), core_schema.no_info_plain_validator_function(self._read)],
            mode="left_to_right",
            custom_error_type=f"postgres_{self.name}",
            custom_error_message=f"Input should be a {self.name}",
            serialization=core_schema.plain_serializer_function_ser_schema(
                _temporal_text, return_schema=core_schema.str_schema(), when_used="json"
            ),
        )

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(core_schema.str_schema())

    def _read(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"not a {self.name}")  # noqa: TRY004 - pydantic takes ValueErrors
        return self.read(value)


def _temporal_text(value: Any) -> str:
    return value.text if isinstance(value, OutOfRange) else str(value.isoformat())


Timestamp: TypeAlias = Annotated[datetime, _OrText(_datetime(None), "timestamp")]
"""``timestamp``: without a zone."""
Timestamptz: TypeAlias = Annotated[datetime, _OrText(_datetime(UTC), "timestamptz")]
"""``timestamptz``: in UTC."""
Date: TypeAlias = Annotated[date, _OrText(_date, "date")]
"""``date``."""
Time: TypeAlias = Annotated[time, _OrText(_time, "time")]
"""``time``."""
Timetz: TypeAlias = Annotated[time, _OrText(_time, "timetz")]
"""``timetz``: with its offset."""

# --- numbers, bytes, JSON --------------------------------------------------------------------

Numeric: TypeAlias = Annotated[Decimal, Field(allow_inf_nan=True)]
"""``numeric``: exact, NaN and infinity included."""


def _bytea(value: Any) -> Any:
    return bytes.fromhex(value[2:]) if isinstance(value, str) and value.startswith("\\x") else value


Bytea: TypeAlias = Annotated[
    bytes,
    BeforeValidator(_bytea),
    PlainSerializer(lambda value: f"\\x{value.hex()}", return_type=str),
]
"""``bytea``: changes carry it as hexadecimal text."""


def _json_text(value: Any) -> Any:
    return from_json(value) if isinstance(value, str) else value


JsonText: TypeAlias = Annotated[
    JsonValue,
    BeforeValidator(_json_text),
    PlainSerializer(
        lambda value: None if value is None else to_json(value).decode(), when_used="json"
    ),
]
"""``json`` or ``jsonb`` within a composite or an array of a domain, where it is text."""

# --- arrays, composites, ranges --------------------------------------------------------------


def _array(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return from_json(value) if is_vector(value) else parse_array(value)


Array: TypeAlias = Annotated[list[T | None], BeforeValidator(_array)]
"""An array: any element may be null. Lower bounds other than 1 are dropped.

The text of pgvector's ``vector`` (``[1,2.5]``) is read as well.
"""


class Composite(BaseModel):
    """A value of a composite type. Subclass it with the type's attributes in their order."""

    model_config = ConfigDict(
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
        ser_json_inf_nan="strings",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        fields = parse_record(value)
        if len(fields) != len(cls.model_fields):
            raise ValueError(f"{len(fields)} attributes instead of {len(cls.model_fields)}")
        return dict(zip(cls.model_fields, fields, strict=True))


class Range(Generic[T]):
    """A range; a bound that is None is infinite. Immutable.

    >>> 3 in Range(1, 5), str(Range(1, 5))
    (True, '[1,5)')
    """

    __slots__ = ("is_empty", "lower", "lower_inclusive", "upper", "upper_inclusive")

    def __init__(
        self,
        lower: T | None = None,
        upper: T | None = None,
        *,
        lower_inclusive: bool = True,
        upper_inclusive: bool = False,
        is_empty: bool = False,
    ) -> None:
        self.lower = lower
        self.upper = upper
        self.lower_inclusive = lower_inclusive
        self.upper_inclusive = upper_inclusive
        self.is_empty = is_empty

    def __eq__(self, other: object) -> bool:
        """Return whether the other is the same range: bounds and what they include."""
        return isinstance(other, Range) and other._parts() == self._parts()

    def __hash__(self) -> int:
        """Return the hash of bounds and what they include."""
        return hash(self._parts())

    def __repr__(self) -> str:
        """Return the class and PostgreSQL's text."""
        return f"Range({str(self)!r})"

    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __contains__(self, value: Any) -> bool:
        """Return whether a value lies within."""
        if self.is_empty:
            return False
        lower: Any = self.lower
        upper: Any = self.upper
        above = lower is None or value > lower or (self.lower_inclusive and value == lower)
        below = upper is None or value < upper or (self.upper_inclusive and value == upper)
        return bool(above and below)

    def __str__(self) -> str:
        """Return PostgreSQL's text."""
        if self.is_empty:
            return "empty"
        lower, upper = ("" if b is None else quote_bound(str(b)) for b in (self.lower, self.upper))
        opening, closing = (
            "[" if self.lower_inclusive else "(",
            "]" if self.upper_inclusive else ")",
        )
        return f"{opening}{lower},{upper}{closing}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read the text; bounds have the type argument's type."""
        arguments = get_args(source)
        bound = handler.generate_schema(arguments[0] if arguments else str)
        flag = core_schema.bool_schema()
        fields = {
            "lower": core_schema.nullable_schema(bound),
            "upper": core_schema.nullable_schema(bound),
            "lower_inclusive": flag,
            "upper_inclusive": flag,
            "is_empty": flag,
        }
        parts = core_schema.typed_dict_schema(
            {name: core_schema.typed_dict_field(schema) for name, schema in fields.items()}
        )
        built = core_schema.no_info_after_validator_function(lambda found: cls(**found), parts)
        read = core_schema.no_info_before_validator_function(_range_parts, built)
        return core_schema.union_schema(
            [core_schema.is_instance_schema(cls), read],
            mode="left_to_right",
            custom_error_type="postgres_range",
            custom_error_message="Input should be a range",
            serialization=core_schema.to_string_ser_schema(when_used="json"),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Say that it is text."""
        return handler(core_schema.str_schema())


def _range_parts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    bounds = parse_range(value)
    if bounds is None:
        return {**Bounds(None, None, False, False)._asdict(), "is_empty": True}
    return {**bounds._asdict(), "is_empty": False}


def _multirange(value: Any) -> Any:
    return parse_multirange(value) if isinstance(value, str) else value


Multirange: TypeAlias = Annotated[list[Range[T]], BeforeValidator(_multirange)]
"""A multirange: its ranges, in order."""
