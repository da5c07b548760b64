"""Pieces of Python source as `ruff format` leaves them. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from textwrap import dedent
from typing import Final

WIDTH: Final = 88
INDENT: Final = "    "


def literal(text: str) -> str:
    r"""Return a string literal: double quotes unless single ones need fewer escapes.

    >>> print(literal('say "hi"\n'))
    'say "hi"\n'
    """
    quote = "'" if text.count('"') > text.count("'") else '"'
    body = "".join(_escaped(char, quote) for char in text)
    return f"{quote}{body}{quote}"


def _escaped(char: str, quote: str) -> str:
    if char in {"\\", quote}:
        return f"\\{char}"
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def docstring(text: str, indent: str = INDENT) -> list[str]:
    """Return the lines of a docstring; empty for a text without a word."""
    lines = _clean(text)
    if not lines:
        return []
    escaped = [line.replace("\\", "\\\\").replace('"""', r"\"\"\"") for line in lines]
    if escaped[-1].endswith('"') and len(lines) == 1:
        escaped[-1] = f'{escaped[-1][:-1]}\\"'
    if escaped[0].startswith('"'):  # a formatter would put a space before it
        escaped[0] = f"\\{escaped[0]}"
    if len(escaped) == 1:
        return [f'{indent}"""{escaped[0]}"""']
    middle = [f"{indent}{line}" if line else "" for line in escaped[1:]]
    return [f'{indent}"""{escaped[0]}', *middle, f'{indent}"""']


def _clean(text: str) -> list[str]:
    """Return the text's lines without control characters, common indentation and ragged ends."""
    plain = "\n".join(
        "".join(char if char.isprintable() else " " for char in line).rstrip()
        for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ).strip("\n")
    first, _, rest = plain.partition("\n")
    lines = [first.strip(), *dedent(rest).rstrip().split("\n")] if rest.strip() else [first.strip()]
    return lines if any(lines) else []


def call(head: str, arguments: Sequence[str], tail: str, indent: str = "") -> list[str]:
    """Return ``head(arguments)tail``, an argument a line when it is too long for one line.

    ``head`` ends with its bracket, ``tail`` begins with it.
    """
    line = f"{indent}{head}{', '.join(arguments)}{tail}"
    if width(line) <= WIDTH:
        return [line]
    if not all(map(_is_kept, arguments)):
        return [kept(line)]
    return [
        f"{indent}{head}",
        *(f"{indent}{INDENT}{argument}," for argument in arguments),
        f"{indent}{tail}",
    ]


def _is_kept(argument: str) -> bool:
    """Whether the formatter leaves an argument in a line of its own as it is."""
    return width(argument) + 2 * len(INDENT) + 1 <= WIDTH or not set("([|") & set(argument)


def kept(line: str) -> str:
    """Return a line that the formatter leaves as it is, whatever its idea of a long line."""
    return line if width(line) <= WIDTH else f"{line}  # fmt: skip"


def width(line: str) -> int:
    """Return how many columns a line takes on a screen."""
    return sum(_columns(char) for char in line)


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1


def imports(names: Iterable[tuple[str, str]], first_party: str) -> list[str]:
    """Return import lines of (name, module) pairs: standard library, others, ``first_party``."""
    modules: dict[str, list[str]] = {}
    for name, module in sorted(names):
        modules.setdefault(module, []).append(name)
    lines: list[str] = []
    for section in ("", "pydantic", first_party):
        found = [module for module in sorted(modules) if _section(module, first_party) == section]
        for module in found:
            head = f"from {module} import "
            one_line = head + ", ".join(modules[module])
            if width(one_line) <= WIDTH:
                lines.append(one_line)
            else:
                lines += call(f"{head}(", modules[module], ")")
        if found:
            lines.append("")
    return lines


def _section(module: str, first_party: str) -> str:
    root = module.partition(".")[0]
    return root if root in {"pydantic", first_party} else ""
