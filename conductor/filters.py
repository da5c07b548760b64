"""Filters of triggers, in CEL (the Common Expression Language).

A change's filter sees ``new``, ``old`` (maps of columns, null where there is no such row),
``changed`` (a list of columns) and ``op``; an event's filter sees ``event``, its payload. Values
are JSON as the router sends it: numeric and dates are strings, ``double(new.price) > 9.5`` and
``timestamp(new.created_at)`` convert them. An expression is compiled once and never becomes SQL.
The library, which brings its own command line, is imported with the first filter. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from conductor.errors import FilterFailed, FilterInvalid, UnknownColumn, did_you_mean
from conductor.texts import clean, flaw_of

if TYPE_CHECKING:
    import cel

__all__ = [
    "CHANGE_NAMES",
    "EVENT_NAMES",
    "MACROS",
    "MAPS",
    "BrokenFilter",
    "Filter",
    "FilterFailed",
    "References",
    "check_columns",
    "check_names",
    "compile",
    "compile_stored",
    "evaluate",
    "tokens_of",
]

CHANGE_NAMES: Final = frozenset({"new", "old", "changed", "op"})
EVENT_NAMES: Final = frozenset({"event"})

MAPS: Final = frozenset({"new", "old", "event"})
MACROS: Final = frozenset({"all", "exists", "exists_one", "filter", "map"})
_TYPES: Final = frozenset(
    {"bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"}
)
_FUNCTIONS: Final = frozenset({
    "bytes", "contains", "double", "duration", "dyn", "endsWith", "getDate", "getDayOfMonth",
    "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours", "getMilliseconds", "getMinutes",
    "getMonth", "getSeconds", "int", "matches", "size", "startsWith", "string", "timestamp", "type",
    "uint",
})  # fmt: skip
_CACHED: Final = 4096
_MAX_LENGTH: Final = 65_535
_MAX_OPERATORS: Final = 1_000
"""The library recurses once for each operator of a chain: 1,500 end a process in a thread with 1 MB
of stack, which is all that some platforms give a thread."""
_OPERATORS: Final = frozenset({*"+-*/%<>!.[", "in"})  # and ==, of two marks
_COLLECTING: Final = frozenset({"filter", "map"})
"""The library copies what they have found so far with every member: n² for a list of n."""
_MAX_STEPS: Final = 25_000_000
"""Some three seconds, in which no other thread of the process runs: leases and probes wait."""

_TOKEN: Final = re.compile(
    r"""(?P<blank>\s+|//[^\n]*)
    |(?P<text>(?:[rR][bB]?|[bB][rR]?)?(?:
        \"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'))
    |(?P<number>\d[\w.]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A piece of an expression: ``kind`` is text, number, name or mark."""

    kind: str
    text: str


_END: Final = Token("mark", "")


@dataclass(frozen=True, slots=True)
class References:
    """What an expression reads: of each map the ``columns`` by name, and which maps as ``whole``.

    ``names`` are all variables; ``changed`` the columns that are looked for in ``changed``.
    """

    names: frozenset[str]
    columns: Mapping[str, frozenset[str]]
    whole: frozenset[str]
    changed: frozenset[str]

    @property
    def reads_changed(self) -> bool:
        """Whether it asks which columns changed."""
        return "changed" in self.names

    @property
    def row_columns(self) -> frozenset[str]:
        """Every column that is named."""
        return self.columns["new"] | self.columns["old"] | self.changed


NO_REFERENCES: Final = References(
    frozenset(), dict.fromkeys(MAPS, frozenset()), frozenset(), frozenset()
)


class Filter:
    """A compiled expression; see `compile`."""

    __slots__ = ("_degree", "_program", "references", "source")

    def __init__(
        self, source: str, program: cel.Program, references: References, degree: int = 1
    ) -> None:
        self.source = source
        self.references = references
        self._program = program
        self._degree = degree

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Return what the expression says of these variables. Raises FilterFailed.

        >>> compile("new.price > 3").matches({"new": {"price": 5}})
        True
        """
        if self._degree > 1:
            self._check_effort(values)
        try:
            found = self._program.execute(dict(values))
        except Exception as error:
            raise FilterFailed(f"filter {self.source!r}: {_reason(error)}") from error
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise FilterFailed(f"filter {self.source!r}: {_reason(error)}") from error
        if not isinstance(found, bool):
            raise FilterFailed(f"filter {self.source!r} gives {type(found).__name__}, not a bool")
        return found

    def _check_effort(self, values: Mapping[str, Any]) -> None:
        """Raise FilterFailed for values on which the macros would take the process away."""
        count, longest = _size(values)
        if count * longest ** (self._degree - 1) > _MAX_STEPS:
            raise FilterFailed(
                f"filter {self.source!r}: {count} values, in lists and maps of up to {longest},"
                " are too many for its macros"
            )


class BrokenFilter:
    """A stored expression that this version cannot compile: it fails for every change or event."""

    __slots__ = ("_error", "references", "source")

    def __init__(self, source: str, error: FilterInvalid) -> None:
        self.source = source
        self.references = NO_REFERENCES
        self._error = error

    def matches(self, values: Mapping[str, Any]) -> bool:  # noqa: ARG002 - as Filter's
        """Raise FilterFailed."""
        raise FilterFailed(str(self._error))


AnyFilter: TypeAlias = Filter | BrokenFilter


def compile(source: Any) -> Filter:  # noqa: A001 - as in the module re
    """Compile an expression; one that was compiled before is kept. Raises FilterInvalid.

    >>> compile('new.email.endsWith("@example.com")').references.columns["new"]
    frozenset({'email'})
    """
    if not isinstance(source, str) or not source.strip():
        raise FilterInvalid(f"a filter is the text of a CEL expression, not {source!r}")
    if flaw := flaw_of(source):
        raise FilterInvalid(f"filter {source!r} holds {flaw}", hint="CEL has escapes: '\\u00e9'.")
    return _compile(source)


@lru_cache(_CACHED)
def _compile(source: str) -> Filter:
    import cel  # noqa: PLC0415 - lazy

    tokens = tuple(tokens_of(source))
    _check_size(source, tokens)
    try:
        program = cel.compile(source)
    except Exception as error:
        raise FilterInvalid(f"filter {source!r} is not CEL: {_reason(error)}") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise FilterInvalid(f"filter {source!r} is not CEL: {_reason(error)}") from error
    _check_functions(source, program)
    _check_patterns(source, tokens)
    return Filter(source, program, _references(tokens, program), _degree(tokens))


def _check_size(source: str, tokens: tuple[Token, ...]) -> None:
    operators = sum(
        token.text in _OPERATORS or before.text == token.text == "="
        for before, token in pairwise((_END, *tokens))
    )
    if len(source) > _MAX_LENGTH or operators > _MAX_OPERATORS:
        raise FilterInvalid(
            f"filter '{source[:40]}…' has {len(source)} characters and {operators} operators: at"
            f" most {_MAX_LENGTH} and {_MAX_OPERATORS}",
            hint="Such as new.id in [1, 2, 3] for many comparisons.",
        )


def _degree(tokens: tuple[Token, ...]) -> int:
    """Return the power of a list's length that the steps of an evaluation grow with, at least 1.

    >>> [_degree(tuple(tokens_of(e))) for e in ("a.b", "a.all(x, b.all(y, x))", "a.map(x, x)")]
    [1, 2, 2]
    """
    found, open_macros = 1, list[bool]()
    for dot, name, bracket in zip((_END, _END, *tokens), (_END, *tokens), tokens, strict=False):
        if bracket.text == "(":
            is_macro = dot.text == "." and name.text in MACROS
            if is_macro:
                found = max(found, sum(open_macros) + 1 + (name.text in _COLLECTING))
            open_macros.append(is_macro)
        elif bracket.text == ")" and open_macros:
            open_macros.pop()
    return found


def _size(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many values there are within values, and the longest list or map among them."""
    count, longest, rest = 0, 0, list[Any](values.values())
    while rest:
        value = rest.pop()
        count += 1
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            longest = max(longest, len(value))
            rest.extend(value)
    return count, longest


def _is_panic(error: BaseException) -> bool:
    """Return whether it is the library's own, which is no Exception."""
    return type(error).__name__ == "PanicException"


def compile_stored(source: str) -> AnyFilter:
    """Compile an expression of a stored subscription, which another version has checked."""
    try:
        return compile(source)
    except FilterInvalid as error:
        return BrokenFilter(source, error)


def check_names(found: Filter, known: Iterable[str]) -> None:
    """Raise FilterInvalid for a variable that the filter of this trigger does not have."""
    for name in sorted(found.references.names - frozenset(known)):
        meant = did_you_mean(name, known)
        raise FilterInvalid(
            f"filter {found.source!r}: unknown variable {name!r}{meant}",
            hint=f"Variables: {', '.join(sorted(known))}.",
        )


def check_columns(found: Filter, columns: Iterable[str], where: str) -> None:
    """Raise UnknownColumn for a column that is not among these."""
    known = set(columns)
    for column in sorted(found.references.row_columns - known):
        raise UnknownColumn(column, known, where=f"{where} in filter {found.source!r}")


def _check_functions(source: str, program: cel.Program) -> None:
    for name in program.functions():
        if name.isidentifier() and name not in _FUNCTIONS:
            meant = did_you_mean(name, _FUNCTIONS | MACROS)
            raise FilterInvalid(
                f"filter {source!r}: unknown function {name!r}{meant}",
                hint="Functions are those of the CEL specification.",
            )


def _check_patterns(source: str, tokens: tuple[Token, ...]) -> None:
    """Try the regular expressions that are written out."""
    for name, bracket, pattern in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if name.text == "matches" and bracket.text == "(" and pattern.kind == "text":
            try:
                evaluate(f'"".matches({pattern.text})')
            except Exception as error:
                raise FilterInvalid(f"filter {source!r}: {_reason(error)}") from error


def _references(tokens: tuple[Token, ...], program: cel.Program) -> References:
    columns: dict[str, set[str]] = {name: set() for name in MAPS}
    whole: set[str] = set()
    bound: set[str] = set()
    changed: set[str] = set()
    padded = (_END, *tokens, *[_END] * 4)
    for before, token, *after in zip(*(padded[i:] for i in range(6)), strict=False):
        if token.kind == "text" and [t.text for t in after[:2]] == ["in", "changed"]:
            changed.add(_text(token))
        if token.kind != "name":
            continue
        if before.text == "." and token.text in MACROS and after[0].text == "(":
            bound.add(after[1].text)
        if before.text == "." or token.text not in MAPS:
            continue
        column = _column(after)
        if column is None:
            whole.add(token.text)
        else:
            columns[token.text].add(column)
    return References(
        names=frozenset(program.variables()) - bound - _TYPES,
        columns={name: frozenset(found) for name, found in columns.items()},
        whole=frozenset(whole),
        changed=frozenset(changed),
    )


def _column(after: list[Token]) -> str | None:
    """Return the key that is read of a map, by what follows its name; None for the map itself."""
    first, second, third, *_ = after
    if first.text == "." and second.kind == "name" and third.text != "(":
        return second.text
    if first.text == "[" and second.kind == "text" and third.text == "]":
        return _text(second)
    return None


def _text(token: Token) -> str:
    return str(evaluate(token.text))


def evaluate(source: str) -> Any:
    """Return the value of a literal."""
    import cel  # noqa: PLC0415 - lazy

    return cel.evaluate(source)


def tokens_of(source: str) -> Iterator[Token]:
    """Yield the pieces of an expression, without blanks and comments."""
    for match in _TOKEN.finditer(source):
        kind = match.lastgroup or ""
        if kind != "blank":
            yield Token(kind, match[0])


def _reason(error: BaseException) -> str:
    """Return one line of an error; a KeyError's is only the key."""
    if isinstance(error, KeyError):
        return clean(f"no such key: {error.args[0]!r}")
    first = str(error).partition("\n| ")[0]
    return clean(" ".join(first.partition(". CEL does not coerce")[0].split()))
