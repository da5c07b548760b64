"""The page of results: a later run puts its rows in, and leaves what it has not measured."""

from __future__ import annotations

import pytest

from benchmarks.report import HEAD, RESULTS, Result, merge

ABOUT: dict[str, str | int | None] = {
    "at": "2026-01-02T03:04:05+00:00",
    "server": "18.1",
    "python": "3.11.7",
    "cores": 2,
}


def result(name: str, value: float) -> Result:
    return Result(name, "so much", value, "ratio", "≤ 2")


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "x", "--write"])


def test_the_first_run_is_one_table() -> None:
    page = merge("", [result("a", 1), result("b", 2)], ABOUT)
    assert page.startswith(HEAD)
    assert page.count("| what |") == 1
    assert (
        '`make bench ARGS="--only x --write"`, 2026-01-02: PostgreSQL 18.1, Python 3.11.7, 2 cores.'
        in page
    )
    assert page.endswith("| a | so much | 1.00 | ≤ 2 |\n| b | so much | 2.00 | ≤ 2 |\n")


def test_a_later_run_replaces_its_own_rows_alone() -> None:
    first = merge("", [result("a", 1), result("b", 2)], ABOUT)
    page = merge(first, [result("b", 3), result("c", 4)], {**ABOUT, "at": "2026-02-03"})
    rows = [line for line in page.splitlines() if "so much" in line]
    assert rows == [
        "| a | so much | 1.00 | ≤ 2 |",
        "| b | so much | 3.00 | ≤ 2 |",
        "| c | so much | 4.00 | ≤ 2 |",
    ]
    assert page.count(HEAD) == 1
    assert page.index("2026-01-02") < page.index("| a |") < page.index("2026-02-03")


def test_a_run_that_has_no_row_left_is_gone() -> None:
    first = merge("", [result("a", 1)], ABOUT)
    page = merge(first, [result("a", 2)], {**ABOUT, "at": "2026-02-03"})
    assert "2026-01-02" not in page
    assert page == merge("", [result("a", 2)], {**ABOUT, "at": "2026-02-03"})


def test_the_page_that_is_there_is_one_that_can_be_merged() -> None:
    before = [line for line in RESULTS.read_text().splitlines() if line.startswith("| ")]
    after = merge(RESULTS.read_text(), [result("new", 1)], ABOUT).splitlines()
    assert set(before) <= set(after)
    assert after[-1] == "| new | so much | 1.00 | ≤ 2 |"
