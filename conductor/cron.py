"""When a cron expression fires. Pure: the instant to start from is a parameter.

Five fields, in the local time of an IANA zone. Where the clock is moved, as Debian's cron does it:

- An expression whose minute and hour fields both begin with anything but ``*`` names times
  of day: each fires once, also in the hour that an autumn night repeats (the first time), and one
  that a spring night leaves out fires as soon as that gap ends.
- Any other names intervals: it fires at every instant whose local time matches.

A firing is identified by its UTC instant. Day of month and day of week are alternatives only when
neither begins with ``*``, as in cron.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfo

from croniter import CroniterBadDateError, croniter

from conductor.errors import CronInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator

_DAY: Final = timedelta(days=1)
_MINUTE: Final = timedelta(minutes=1)
_ALPHABET: Final = frozenset("0123456789*,-/#?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
# croniter reads 5-5 as the whole field; cron, and everybody who writes it, as 5.
_SINGLE: Final = re.compile(r"(?<![\w-])(\w+)-\1(/\d+)?(?![\w/-])")
_CHECKED_FROM: Final = datetime(2000, 1, 1, tzinfo=UTC)


def check(expression: str, tz: str) -> None:
    """Raise CronInvalid unless the expression can be read and fires some day in a known zone.

    >>> check("0 0 30 2 *", "UTC")
    Traceback (most recent call last):
    conductor.errors.CronInvalid: cron expression '0 0 30 2 *' never fires
    """
    fields = expression.split()
    if len(fields) != 5:
        raise CronInvalid(f"cron expression {expression!r} has {len(fields)} fields, not 5")
    # croniter also takes hashed and random fields: neither is the same in two processes.
    unstable = any(field[0] in "hHrR" for field in fields)
    if unstable or not _ALPHABET.issuperset("".join(fields)):
        raise CronInvalid(f"cron expression {expression!r} cannot be read")
    _zone(tz)
    next_fire(expression, tz, _CHECKED_FROM)


def next_fire(expression: str, tz: str, after: datetime) -> datetime:
    """Return the first firing later than ``after`` (an aware datetime), in UTC.

    >>> next_fire("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, 12, tzinfo=UTC)).isoformat()
    '2026-03-29T01:00:00+00:00'
    """
    zone = _zone(tz)
    minute, hour, *_ = expression.split()
    if minute.startswith("*") or hour.startswith("*"):
        return _next_interval(expression, zone, after.astimezone(UTC))
    return _next_time_of_day(expression, zone, after.astimezone(UTC))


def fires_between(expression: str, tz: str, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the firings later than ``after`` and not later than ``until``, in order."""
    instant = next_fire(expression, tz, after)
    while instant <= until:
        yield instant
        instant = next_fire(expression, tz, instant)


@lru_cache(maxsize=256)
def _zone(tz: str) -> ZoneInfo:
    try:
        return ZoneInfo(tz)
    except (KeyError, ValueError, OSError) as error:
        raise CronInvalid(f"unknown time zone {tz!r}", hint="Such as 'Europe/Berlin'.") from error


def _next_wall(expression: str, wall: datetime) -> datetime:
    """Return the first matching wall time later than ``wall``; both naive."""
    try:
        plain = _SINGLE.sub(r"\1", expression)
        walls = croniter(plain, wall, ret_type=datetime, implement_cron_bug=True)
        found: datetime = walls.get_next()
    except CroniterBadDateError as error:
        raise CronInvalid(f"cron expression {expression!r} never fires") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CronInvalid(f"cron expression {expression!r} cannot be read: {error}") from error
    return found


def _next_time_of_day(expression: str, zone: ZoneInfo, after: datetime) -> datetime:
    wall = after.astimezone(zone).replace(tzinfo=None, fold=0)
    while True:
        wall = _next_wall(expression, wall)
        instant = wall.replace(tzinfo=zone).astimezone(UTC)
        real = wall
        while instant.astimezone(zone).replace(tzinfo=None) != real:  # a gap: go to its end
            real += _MINUTE
            instant = real.replace(tzinfo=zone).astimezone(UTC)
        if instant > after:  # else it fired in the first pass of a repeated hour
            return instant


def _next_interval(expression: str, zone: ZoneInfo, after: datetime) -> datetime:
    """Search span by span: within one, the zone's offset does not change."""
    start, offset = after, _offset(zone, after)
    wall = _naive(after + offset)
    while True:
        instant = _next_wall(expression, wall).replace(tzinfo=UTC) - offset
        changed_at = _change(zone, start, instant)
        if changed_at is None:
            return instant
        start, offset = changed_at, _offset(zone, changed_at)
        wall = _naive(changed_at + offset) - timedelta(microseconds=1)  # it may match itself


def _naive(instant: datetime) -> datetime:
    return instant.replace(tzinfo=None)


def _offset(zone: ZoneInfo, instant: datetime) -> timedelta:
    offset = instant.astimezone(zone).utcoffset()
    assert offset is not None  # noqa: S101 - a zone always has one
    return offset


def _change(zone: ZoneInfo, start: datetime, end: datetime) -> datetime | None:
    """Return the first change of the zone's offset in (start, end], None if there is none.

    Looks at one instant a day: no zone has moved its clock there and back within one.
    """
    offset, low = _offset(zone, start), start
    while low < end:
        high = min(low + _DAY, end)
        if _offset(zone, high) != offset:
            while high - low > timedelta(seconds=1):
                middle = low + (high - low) / 2
                low, high = (middle, high) if _offset(zone, middle) == offset else (low, middle)
            return high.replace(microsecond=0)
        low = high
    return None
