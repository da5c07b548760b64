"""Values of a declared type, to JSON text and back, by pydantic.

A codec is built from any form `pydantic.TypeAdapter` takes. Definitions `check` theirs when they
are made; a form with names that are defined later is built at its first use. Pure.
"""

from __future__ import annotations

from functools import cached_property
from types import NoneType, UnionType
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaWarningKind
from pydantic_core import PydanticSerializationError, from_json, to_json
from typing_extensions import ReadOnly, TypeVar, is_typeddict

from conductor.texts import TextInvalid, check_document, check_value, clean

T = TypeVar("T")

INVALID: Final = (ValidationError, PydanticSerializationError, ValueError, TypeError)
"""What `Codec.encode` and `Codec.decode` raise for a value of another type."""

_JSON_SCALARS: Final = frozenset({Any, object, str, int, float, bool, None, NoneType})
_TRANSPARENT: Final = frozenset({Union, UnionType, Required, NotRequired, ReadOnly, list})


def is_json_form(form: Any) -> bool:
    """Return whether parsed JSON already has this type: nothing needs to be converted.

    >>> is_json_form(dict[str, list[int] | None])
    True
    >>> is_json_form(set[int])
    False
    """
    if isinstance(form, (list, dict)) or form in _JSON_SCALARS or form in {list, dict}:
        return True
    if is_typeddict(form):
        return all(map(is_json_form, get_type_hints(form, include_extras=False).values()))
    origin, arguments = get_origin(form), get_args(form)
    if origin is Literal:
        return all(isinstance(value, (str, int, NoneType)) for value in arguments)
    if origin is dict:
        return arguments[0] is str and is_json_form(arguments[1])
    return origin in _TRANSPARENT and all(map(is_json_form, arguments))


class FormInvalid(ValueError):  # noqa: N818 - as in conductor.errors
    """Pydantic cannot take a form. ``hint`` says what to do about it."""

    def __init__(self, form: Any, cause: BaseException) -> None:
        self.hint: str | None = None
        shown = form.__name__ if isinstance(form, type) else repr(form)
        if getattr(cause, "code", None) == "typed-dict-version":
            super().__init__(
                f"{shown} is or holds a typing.TypedDict, which cannot be validated before"
                " Python 3.12"
            )
            self.hint = "from typing_extensions import TypedDict (or validate=False for plain JSON)"
        else:
            reason = str(getattr(cause, "message", cause)).partition("\n")[0]
            if isinstance(cause, LookupError):
                reason = "it is no type"
            super().__init__(f"pydantic cannot take {shown}: {reason}")


class QuietSchema(GenerateJsonSchema):
    """A JSON schema for ourselves: what it leaves out is no concern of the application's."""

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """Say nothing."""


class Codec(Generic[T]):
    """One declared type. ``validate=False`` trusts its values and checks nothing.

    Even then a type that JSON does not have itself (a model, a date) is converted when it is read.
    """

    def __init__(self, form: Any, *, validate: bool = True) -> None:
        self.form = form
        self.is_none = form is None or form is NoneType
        self._validate = validate
        self._schemas: dict[str, dict[str, Any] | None] = {}

    @property
    def validates(self) -> bool:
        """Whether values are checked."""
        return self._validate

    @cached_property
    def adapter(self) -> TypeAdapter[T]:
        """The adapter of the form. Raises TypeError when pydantic cannot take the form."""
        try:
            return TypeAdapter(self.form)
        except PydanticUserError as error:
            raise TypeError(f"pydantic cannot validate {self.form!r}: {error.message}") from error

    @cached_property
    def _is_parsed(self) -> bool:
        return not self._validate and is_json_form(self.form)

    def check(self) -> None:
        """Build what the type needs, unless it has names that are not defined yet.

        Raises FormInvalid for a type that pydantic cannot take.
        """
        try:
            if not self.is_none and not self._is_parsed:
                _ = self.adapter
        except NameError:
            return
        except Exception as error:  # whatever pydantic makes of what is no type
            raise FormInvalid(self.form, error.__cause__ or error) from error

    def encode(self, value: T) -> bytes:
        """Return JSON text. Raises one of `INVALID`."""
        if self.is_none:
            if value is not None:
                raise ValueError("nothing is declared, so only None can be given")
            return b"null"
        if not self._validate:
            return to_json(value, by_alias=True)
        adapter = self.adapter
        checked = adapter.validator.validate_python(value)
        return adapter.serializer.to_json(checked, by_alias=True, round_trip=True)

    def encode_stored(self, value: T) -> bytes:
        """Return JSON text that any reader in SQL can read. Raises one of `INVALID`."""
        try:
            return check_document(self.encode(value))
        except PydanticSerializationError:
            check_value(value)  # a lone surrogate, and where it is
            raise

    def decode(self, data: bytes) -> T:
        """Read JSON text. Raises one of `INVALID`. No type takes ``null`` and ``{}`` alike."""
        if self.is_none:
            if data not in {b"null", b"{}"} and from_json(data):
                raise ValueError("nothing is declared, but something was sent")
            return None  # type: ignore[return-value]  # T is None here
        if self._is_parsed:
            value: T = from_json(data)
            return value
        return self.adapter.validator.validate_json(data)  # type: ignore[no-any-return]  # it is T

    def members(self) -> frozenset[str] | None:
        """Return the keys of the JSON object that values are; None when they are not known."""
        schema = self.schema() or {}
        reference = schema.get("$ref", "")
        if reference:
            schema = schema["$defs"][reference.rpartition("/")[2]]
        known = schema.get("properties")
        return None if known is None or schema.get("additionalProperties") else frozenset(known)

    def schema(self, mode: JsonSchemaMode = "validation") -> dict[str, Any] | None:
        """Return the JSON schema, made once, or None as long as a name is not defined yet."""
        try:
            if mode not in self._schemas:
                self._schemas[mode] = self.json_schema(mode)
            return self._schemas[mode]
        except (NameError, ValueError):
            return None

    def json_schema(self, mode: JsonSchemaMode = "validation") -> dict[str, Any] | None:
        """Return the JSON schema, or None for a type that has none."""
        try:
            return self.adapter.json_schema(mode=mode, schema_generator=QuietSchema)
        except (PydanticUserError, TypeError):
            return None


def explain(error: Exception) -> tuple[str, list[Any]]:
    """Return one line and pydantic's errors, both without the values that were wrong.

    Both can be stored: what PostgreSQL cannot hold of a text is left out.
    """
    if isinstance(error, TextInvalid):
        return str(error), [{"loc": error.place, "msg": error.args[0], "type": "text_invalid"}]
    if not isinstance(error, ValidationError):
        return clean(str(error)), []
    found = error.errors(include_url=False, include_input=False, include_context=False)
    errors: list[Any] = [
        {**e, "loc": tuple(map(_part, e["loc"])), "msg": clean(e["msg"])} for e in found
    ]
    lines = (
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else str(e["msg"]) for e in errors
    )
    return "; ".join(lines), errors


def _part(part: str | int) -> str | int:
    return clean(part) if isinstance(part, str) else part
