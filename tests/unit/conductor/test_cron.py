from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.cron import check, fires_between, next_fire
from conductor.errors import CronInvalid

BERLIN = "Europe/Berlin"
ZONES = ["UTC", BERLIN, "America/New_York", "Australia/Sydney", "Asia/Kolkata", "Asia/Tehran"]


def instants(expression: str, start: str, end: str, tz: str = BERLIN) -> list[str]:
    """Firings between two local times of the zone, as UTC hours and minutes."""
    zone = ZoneInfo(tz)
    after, until = (datetime.fromisoformat(text).replace(tzinfo=zone) for text in (start, end))
    return [f"{at:%H:%M}" for at in fires_between(expression, tz, after, until)]


def test_time_of_day_fires_once_in_the_repeated_hour() -> None:
    # 2026-10-25: 02:00-03:00 happens twice, 00:00-01:00 and 01:00-02:00 UTC.
    assert instants("30 2 * * *", "2026-10-25T00:00", "2026-10-25T23:00") == ["00:30"]
    second_pass = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)
    assert next_fire("30 2 * * *", BERLIN, second_pass) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_interval_fires_at_each_instant_of_the_repeated_hour() -> None:
    assert instants("*/15 * * * *", "2026-10-25T01:59", "2026-10-25T03:00") == [
        "00:00", "00:15", "00:30", "00:45", "01:00", "01:15", "01:30", "01:45", "02:00",
    ]  # fmt: skip
    assert instants("0 */2 * * *", "2026-10-25T01:00", "2026-10-25T05:00") == [
        "00:00", "01:00", "03:00",
    ]  # fmt: skip


def test_time_of_day_in_a_spring_gap_fires_when_the_gap_ends() -> None:
    # 2026-03-29: 02:00-03:00 is left out; 03:00 is 01:00 UTC.
    assert instants("30 2 * * *", "2026-03-29T00:00", "2026-03-29T23:00") == ["01:00"]
    assert instants("0,30 2 * * *", "2026-03-29T00:00", "2026-03-29T23:00") == ["01:00"]


def test_interval_leaves_out_what_the_spring_gap_leaves_out() -> None:
    assert instants("0 */2 * * *", "2026-03-29T00:30", "2026-03-29T06:00") == ["02:00", "04:00"]
    assert instants("*/30 * * * *", "2026-03-29T01:00", "2026-03-29T03:30") == [
        "00:30", "01:00", "01:30",
    ]  # fmt: skip


def test_an_offset_of_half_an_hour_moves_the_clock_by_half_an_hour() -> None:
    # Lord Howe, 2026-04-05: at 02:00 local (15:00 UTC the day before) back to 01:30.
    after = datetime(2026, 4, 4, 14, 20, tzinfo=UTC)
    fired = islice(
        fires_between("*/15 * * * *", "Australia/Lord_Howe", after, after + timedelta(1)), 6
    )
    assert [f"{at:%H:%M}" for at in fired] == ["14:30", "14:45", "15:00", "15:15", "15:30", "15:45"]
    once = fires_between("45 1 * * *", "Australia/Lord_Howe", after, after + timedelta(hours=20))
    assert [f"{at:%H:%M}" for at in once] == ["14:45"]


@pytest.mark.parametrize(
    "expression",
    ["@daily", "* * * *", "* * * * * *", "61 * * * *", "a b c d e", "0 0 30 2 *", "0 0 31 9,4 *",
     "H * * * *", "R(0-10) * * * *", "", "0 0 * * 8", "*/0 * * * *", "0 0 * * MON_FRI"],
)  # fmt: skip
def test_refuses_what_cannot_be_read_or_never_fires(expression: str) -> None:
    with pytest.raises(CronInvalid):
        check(expression, "UTC")


@pytest.mark.parametrize("tz", ["Europe", "../etc", "Mars/Olympus", "", "/etc/localtime"])
def test_refuses_unknown_zones(tz: str) -> None:
    with pytest.raises(CronInvalid, match="time zone"):
        check("0 9 * * *", tz)


def test_a_range_of_one_value_is_that_value() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert next_fire("5-5 7-7/3 * 2-2 *", "UTC", start) == datetime(2026, 2, 1, 7, 5, tzinfo=UTC)


def test_rare_expressions_are_accepted() -> None:
    check("0 0 29 2 *", BERLIN)
    check("0 9 * * MON-FRI", BERLIN)
    leap = datetime(2097, 1, 1, tzinfo=UTC)
    assert next_fire("0 0 29 2 *", "UTC", leap) == datetime(2104, 2, 29, tzinfo=UTC)


def field(low: int, high: int, *, wild: bool = True) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    spread = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    several = st.lists(number, min_size=2, max_size=3, unique=True).map(
        lambda numbers: ",".join(map(str, sorted(numbers)))
    )
    step = st.integers(2, max(2, high // 2)).map(lambda n: f"*/{n}")
    exact = st.one_of(number.map(str), spread, several)
    return st.one_of(exact, st.just("*"), step) if wild else exact


EXPRESSIONS = st.tuples(
    field(0, 59), field(0, 23), st.just("*"), st.just("*") | field(1, 12), field(0, 6)
).map(" ".join)
NEAR_A_CHANGE = st.sampled_from(
    [datetime(2026, 3, 7, tzinfo=UTC), datetime(2026, 3, 28, tzinfo=UTC),
     datetime(2026, 10, 3, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC),
     datetime(2026, 10, 31, tzinfo=UTC), datetime(2026, 4, 4, tzinfo=UTC)]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, st.sampled_from(ZONES), NEAR_A_CHANGE, st.integers(0, 2000))
def test_agrees_with_cronsim(expression: str, tz: str, day: datetime, minutes: int) -> None:
    after = day + timedelta(minutes=minutes)
    local = after.astimezone(ZoneInfo(tz))
    expected = islice((at.astimezone(UTC) for at in CronSim(expression, local)), 8)
    # Started inside a repeated hour, the oracle names the first pass, which is over by then.
    wanted = [at for at in expected if at > after]
    fired = islice(
        fires_between(expression, tz, after, datetime.max.replace(tzinfo=UTC)), len(wanted)
    )
    assert list(fired) == wanted


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, st.sampled_from([*ZONES, "Australia/Lord_Howe"]), NEAR_A_CHANGE)
def test_firings_grow_and_do_not_depend_on_where_one_starts(
    expression: str, tz: str, day: datetime
) -> None:
    fired = list(islice(fires_between(expression, tz, day, datetime.max.replace(tzinfo=UTC)), 8))
    assert all(a < b for a, b in pairwise(fired))
    for earlier, later in pairwise(fired):
        middle = earlier + (later - earlier) / 2
        assert next_fire(expression, tz, middle) == later
