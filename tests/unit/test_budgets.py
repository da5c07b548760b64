"""House rules that no other tool checks: sizes, annotations, names, homes of SQL, addresses."""

import ast
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
CODE = ("cdc", "conductor", "tools", "examples", "benchmarks")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
SQL_HOMES = re.compile(r"conductor/sql/|cdc/(\w+_)?queries\.py$")
IGNORED_FOLDERS = {".git", *re.findall(r"(.+)/\n", (PROJECT / ".gitignore").read_text())}
BARE_IGNORE = re.compile(r"#\s*(type|pyright):\s*ignore(?!\[)")
# `alter table` and `alter role` are not among these: hints tell the operator to run them.
STATEMENT = re.compile(
    r"\s*(select\s+\S+(,|\s+from\s)|select\s+[\w.]+\(|insert\s+into\s|update\s+\S+\s+set\s|delete\s+from\s"
    r"|merge\s+into\s|copy\s+\S+\s*(\(|from\s|to\s)|with\s+\w+\s+as\s*(materialized\s*)?\("
    r"|(create|drop|truncate|lock)\s+(table|schema|role|database|index|type|function)\s"
    r"|(create|alter|drop)\s+publication\s)",
    re.IGNORECASE,
)
# Spelled in parts, so that this file passes its own test.
ADDRESSES = re.compile(
    "|".join(
        re.escape(first + second)
        for first, second in (
            ("pypi", ".org"),
            ("pythonhosted", ".org"),
            ("npmjs", ".org"),
            ("deb.debian", ".org"),
            ("--index", "-url"),
            ("--find", "-links"),
            ("/work", "/main"),
            ("/work", "/shared"),
            ("/root", "/"),
        )
    )
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def files_of_project() -> tuple[Path, ...]:
    """Every file outside git-ignored folders."""
    found: list[Path] = []
    for folder, folders, files in os.walk(PROJECT):
        folders[:] = sorted(set(folders) - IGNORED_FOLDERS)
        found += (Path(folder, file) for file in sorted(files))
    return tuple(found)


def python_files(*folders: str) -> Iterator[Path]:
    """The Python files, of these top-level folders when some are given."""
    for path in files_of_project():
        top = path.relative_to(PROJECT).parts[0]
        if path.suffix == ".py" and (not folders or top in folders):
            yield path


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def functions_of(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def long_functions(source: str) -> list[str]:
    return [
        f"{function.name} has {length} lines"
        for function in functions_of(source)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]


def missing_annotations(source: str) -> list[str]:
    missing: list[str] = []
    for function in functions_of(source):
        given = function.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        every = [*named, *(extra for extra in (given.vararg, given.kwarg) if extra)]
        bare = [argument.arg for argument in every if argument.annotation is None]
        missing += [f"{function.name}({arg})" for arg in bare if arg not in {"self", "cls"}]
        if function.returns is None:
            missing.append(f"{function.name} -> ?")
    return missing


def sql_strings(source: str) -> list[str]:
    """The string constants that hold a statement; docstrings may show one."""
    tree = ast.parse(source)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        f"line {node.lineno}: {node.value.strip()[:50]!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
        and STATEMENT.match(node.value)
    ]


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in python_files()}
    assert len(lengths) > 10
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = {name_of(path): long_functions(path.read_text()) for path in python_files()}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_everything_is_annotated() -> None:
    found = {name_of(path): missing_annotations(path.read_text()) for path in python_files(*CODE)}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_ignored_errors_are_named() -> None:
    bare = [
        f"{name_of(path)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARE_IGNORE.search(line) and path != Path(__file__)
    ]
    assert bare == []


def test_modules_are_named_for_what_they_hold() -> None:
    vague = [name_of(path) for path in python_files(*CODE, "tests") if path.stem in VAGUE_NAMES]
    assert vague == []


def test_sql_lives_in_one_place_a_package() -> None:
    found = {
        name_of(path): sql_strings(path.read_text())
        for path in python_files("cdc", "conductor")
        if not SQL_HOMES.match(name_of(path))
    }
    assert {name: strings for name, strings in found.items() if strings} == {}


def test_no_address_of_a_registry_or_of_a_machine() -> None:
    found: list[str] = []
    for path in files_of_project():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{name_of(path)}: {match[0]}" for match in ADDRESSES.finditer(text)]
    assert found == []


LONG = "def long() -> None:\n" + "    pass\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    ("check", "source", "expected"),
    [
        (long_functions, LONG, ["long has 61 lines"]),
        (long_functions, LONG.removesuffix("    pass\n"), []),
        (missing_annotations, "def f(self, a: int, *b, c): ...", ["f(c)", "f(b)", "f -> ?"]),
        (missing_annotations, "async def f(self, *a: int) -> None: ...", []),
        (sql_strings, 'q = "select id from jobs"', ["line 1: 'select id from jobs'"]),
        (sql_strings, 'q = f"Delete from {table}"', ["line 1: 'Delete from'"]),
        (sql_strings, 'q = "with a as (select 1)"', ["line 1: 'with a as (select 1)'"]),
        (sql_strings, 'q = "alter publication p add"', ["line 1: 'alter publication p add'"]),
        (sql_strings, 'def f():\n    "select id from jobs"', []),
        (sql_strings, 'hint = "select a task from the list, update it, then retry"', []),
    ],
)
def test_the_checks_find_what_they_look_for(
    check: Callable[[str], list[str]], source: str, expected: list[str]
) -> None:
    assert check(source) == expected


@pytest.mark.parametrize(
    ("line", "bare"),
    [("x = 1  # type: " + "ignore", True), ("x = 1  # type: ignore[arg-type]", False)],
)
def test_a_bare_ignore_is_found(line: str, *, bare: bool) -> None:
    assert bool(BARE_IGNORE.search(line)) == bare
