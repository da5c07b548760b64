from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

from conductor import filters
from conductor.errors import FilterFailed, FilterInvalid


def references(source: str) -> filters.References:
    return filters.compile(source).references


def test_what_an_expression_reads_is_known() -> None:
    read = references('new.email.endsWith("@e") && old["Odd \\"x"] != new.id && "bio" in changed')
    assert read.columns["new"] == {"email", "id"}
    assert read.columns["old"] == {'Odd "x'}
    assert read.changed == {"bio"}
    assert read.row_columns == {"email", "id", "bio", 'Odd "x'}
    assert read.names == {"new", "old", "changed"}
    assert read.whole == frozenset()
    assert read.reads_changed


@pytest.mark.parametrize(
    "source",
    ["new == null", "new.size() > 2", "new.all(key, key != op)", "new[op] == 1", "size(new) > 1"],
)
def test_a_row_read_as_a_whole_is_known(source: str) -> None:
    read = references(source)
    assert read.whole == {"new"}
    assert read.columns["new"] == frozenset()
    assert read.names <= filters.CHANGE_NAMES


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("new.tags.exists(new_tag, new_tag == op)", {"tags"}),
        ('new.a == "new.b" // new.c', {"a"}),
        ("new.a == r'''new.b'''", {"a"}),
        ("new.a.old.new.b == 1", {"a"}),
        ("has(new.a.b) && type(new.c) == int", {"a", "c"}),
        ("[1, 2].map(x, x * new.n) == [2]", {"n"}),
    ],
)
def test_what_only_looks_like_a_column_is_none(source: str, columns: set[str]) -> None:
    read = references(source)
    assert read.columns["new"] == columns
    assert read.columns["old"] == frozenset()
    filters.check_names(filters.compile(source), filters.CHANGE_NAMES)


@pytest.mark.parametrize(
    ("source", "values", "expected"),
    [
        ("new.id > 9007199254740993", {"new": {"id": 9007199254740994}}, True),
        ("double(new.price) > 9.5", {"new": {"price": "10.00"}}, True),
        ("timestamp(new.at) > timestamp('2026-01-01T00:00:00Z')",
         {"new": {"at": "2026-01-01T00:00:00+00:00"}}, False),
        ("has(new.bio)", {"new": {}}, False),
        ("new.bio == null", {"new": {"bio": None}}, True),
        ("new.data.tags.exists(t, t == 'x')", {"new": {"data": {"tags": ["x"]}}}, True),
        ("old == null", {"old": None}, True),
    ],
)  # fmt: skip
def test_an_expression_is_evaluated(source: str, values: dict[str, Any], *, expected: bool) -> None:
    assert filters.compile(source).matches(values) is expected


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("new.bio == ''", {}, "no such key: 'bio'"),
        ("new.age > 17", {"age": None}, "No such overload"),
        ("new.age", {"age": 3}, "gives int, not a bool"),
        ("1 / new.age > 1", {"age": 0}, "division by zero"),
        ("new.a.matches(new.b)", {"a": "", "b": "["}, "not a valid regex"),
    ],
)
def test_what_cannot_be_evaluated_says_why(source: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(FilterFailed, match=message) as failed:
        filters.compile(source).matches({"new": row})
    assert source in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_stored_expression_that_does_not_compile_fails_when_it_is_used() -> None:
    broken = filters.compile_stored("new.id >")
    assert broken.references.row_columns == frozenset()
    with pytest.raises(FilterFailed, match="is not CEL"):
        broken.matches({"new": {"id": 1}})


@pytest.mark.parametrize("source", [None, 1, ["new.id > 1"], "  "])
def test_only_text_is_compiled(source: Any) -> None:
    with pytest.raises(FilterInvalid, match="text of a CEL expression"):
        filters.compile(source)


@pytest.mark.parametrize(
    "source",
    ["+".join(["1"] * 20_000), "new" + ".a" * 20_000, "new.l" + "[0]" * 20_000,
     "true == " * 20_000 + "true", "string(" * 20_000 + "1" + ")" * 20_000,
     "1 in " * 10_000 + "[1]"],
)  # fmt: skip
def test_what_would_end_the_process_is_refused(source: str) -> None:
    with pytest.raises(FilterInvalid, match="operators: at most 65535 and 1000"):
        filters.compile(source)
    assert isinstance(filters.compile_stored(source), filters.BrokenFilter)


def test_long_filters_are_evaluated() -> None:
    choices = filters.compile(f"new.id in [{', '.join(map(str, range(9_000)))}]")
    assert choices.matches({"new": {"id": 8_999}})
    terms = filters.compile(" || ".join(f"new.id == {number}" for number in range(500)))
    assert terms.matches({"new": {"id": 499}})


IN_A_SMALL_THREAD = """
import sys, threading
from conductor import filters

def run():
    print(filters.compile(sys.argv[1]).matches({"new": {}}))

threading.stack_size(1024 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("depth", [1, 90])
def test_the_longest_chain_fits_on_the_stack_of_a_small_thread(depth: int) -> None:
    source = "1"
    for _ in range(depth):
        source = f"[1].map(x, {source}{'+1' * (999 // depth - 3)})[0]"
    with pytest.raises(FilterInvalid, match="operators: at most"):
        filters.compile(source + "+1" * 20 + " > 0")
    command = [sys.executable, "-c", IN_A_SMALL_THREAD, f"{source} > 0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


@pytest.mark.parametrize(
    "source",
    [
        "event.a.filter(x, x > 3).size() > 0",
        "event.a.map(x, x * 2).size() > 0",
        "event.a.all(x, event.a.exists(y, y == x))",
        "event.a.all(x, [1].all(y, event.a.all(z, z == x)))",
    ],
)
def test_a_filter_whose_steps_grow_faster_than_its_values_fails_on_very_many(source: str) -> None:
    """It would hold the interpreter for a minute, and with it leases, probes and the stream."""
    found = filters.compile(source)
    assert isinstance(found.matches({"event": {"a": list(range(100))}}), bool)
    with pytest.raises(FilterFailed, match="20002 values, in lists and maps of up to 20000, are"):
        found.matches({"event": {"a": list(range(20_000))}})


@pytest.mark.parametrize(
    "source",
    [
        "event.a.all(x, x >= 0) && event.a.exists(x, x > 3)",
        "event.a[3] == 3 && (event.a.size() > 4)",
        "event.filter == null || [1, 2].size() == 2",
    ],
)
def test_a_filter_that_looks_at_each_value_once_takes_many(source: str) -> None:
    values = {"event": {"a": list(range(20_000)), "filter": None}}
    assert filters.compile(source).matches(values)


def test_the_librarys_own_panic_is_an_error_of_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_MAX_LENGTH", 10**6)
    with pytest.raises(FilterInvalid, match="is not CEL"):
        filters.compile("string(" * 20_000 + "1" + ")" * 20_000)


def test_an_expression_is_compiled_once_and_works_in_other_threads() -> None:
    found: list[bool] = []
    compiled = filters.compile("new.id == 1")
    assert filters.compile("new.id == 1") is compiled
    thread = threading.Thread(target=lambda: found.append(compiled.matches({"new": {"id": 1}})))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_library_is_loaded_with_the_first_filter() -> None:
    program = (
        "import sys, conductor.triggers as t; print('cel' in sys.modules);"
        "t.OnChange('public.users', 'insert', when='new.id > 1'); print('cel' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["False", "True"]


TEXTS = {"timestamp": "'2026-01-01T00:00:00Z'", "duration": "'1s'"}


@pytest.mark.parametrize("name", sorted(filters._FUNCTIONS))
def test_every_known_function_exists(name: str) -> None:
    instant, text = "timestamp('2026-01-01T00:00:00Z')", TEXTS.get(name, "'1'")
    forms = (f"{name}({text})", f"'a'.{name}('a')", f"{instant}.{name}()")
    assert any(_evaluates(form) for form in forms)


def _evaluates(source: str) -> bool:
    try:
        filters.compile(f"{source} == {source}").matches({})
    except (FilterFailed, FilterInvalid):
        return False
    return True
