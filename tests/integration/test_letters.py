"""Dead letters are routed again by the code of today, into the very jobs they would have been."""

import asyncio
import json
from typing import Any

import pytest

from cdc.letters import Outcome, list_letters, redrive_letters, show_letter
from cdc.wire.encoding import encode
from cdc.wire.messages import Insert
from conductor.matching import ChangeFilter, change_topic
from tests.integration.sidecar import (
    captured,
    cdc,
    eventually,
    query,
    running,
    settings_for,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

FAILS = "int(new.body) > 0"
TABLES = """
create type mood as enum ('happy', 'sad');
create domain price as int;
create table t (id int, body text, price price, mood mood, note text, primary key (id));
alter table t alter column note set storage external;
alter table t replica identity full;
"""
CHANGES = (
    "insert into t values (1, 'x', 110, 'sad', repeat('n', 5000))",
    "update t set price = 220",
    "update t set id = 2",
    "delete from t",
    "truncate t restart identity cascade",
)


def letters(database: ScratchDatabase) -> list[dict[str, Any]]:
    return query(database.dsn, "select * from conductor.dead_letters order by id")


def jobs_of(database: ScratchDatabase, subscription: int) -> list[tuple[Any, ...]]:
    """Everything that makes a routed job what it is, but whose it is."""
    rows = query(
        database.dsn,
        "select source_generation, source_lsn::text, source_ordinal, trigger, queue, state,"
        " payload::text from conductor.jobs where subscription = %s order by source_lsn, id",
        subscription,
    )
    return [tuple(row.values()) for row in rows]


def correct(database: ScratchDatabase, subscription: int, when: str | None) -> None:
    """Deploy the task with another filter: a new subscription, and the old one retired."""
    query(
        database.dsn,
        "update conductor.subscriptions set retired_at = now() where id = %s",
        subscription,
    )
    subscribe(database.dsn, "public.t", task="broken", when=when)


async def redrive(database: ScratchDatabase, *ids: int) -> list[Outcome]:
    return await redrive_letters(settings_for(database), ids or None)


@pytest.fixture
async def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """Changes of every kind: subscription 1 has its jobs, 2 failed at every one."""
    query(migrated.dsn, TABLES)
    subscribe(migrated.dsn, "public.t", task="sound")
    subscribe(migrated.dsn, "public.t", task="broken", when=FAILS)
    async with running(migrated):
        await captured(migrated, 2)
        for statement in CHANGES:
            query(migrated.dsn, statement)
        await eventually(lambda: len(letters(migrated)) == len(CHANGES), "the letters")
    assert {letter["subscription"] for letter in letters(migrated)} == {2}
    return migrated


async def test_a_letter_becomes_the_job_it_would_have_been(shop: ScratchDatabase) -> None:
    correct(shop, 2, None)
    outcomes = await redrive(shop)
    assert [(o.result, o.jobs) for o in outcomes] == [("routed", 1)] * len(CHANGES)
    assert jobs_of(shop, 2) == jobs_of(shop, 1)
    assert len(jobs_of(shop, 1)) == len(CHANGES)
    assert letters(shop) == []
    async with running(shop):  # and what has started since does not route them a second time
        await captured(shop, 3)
    assert jobs_of(shop, 3) == []
    assert [o.result for o in await redrive(shop, 1)] == ["missing"]


async def test_what_is_refused_again_stays_with_the_new_error(shop: ScratchDatabase) -> None:
    (before, *_) = letters(shop)
    correct(shop, 2, "new.nonesuch == 1")
    (outcome, other) = await redrive(shop, before["id"], 99)
    assert (outcome.result, other.result) == ("kept", "missing")
    (after, *rest) = letters(shop)
    assert after["error"] == outcome.error != before["error"]
    assert {**after, "error": None} == {**before, "error": None}
    assert len(rest) == len(CHANGES) - 1
    assert jobs_of(shop, 2) == []


async def test_what_nobody_wants_any_more_goes(shop: ScratchDatabase) -> None:
    correct(shop, 2, 'op == "insert"')
    outcomes = await redrive(shop)
    assert [o.result for o in outcomes] == ["routed", *["unwanted"] * (len(CHANGES) - 1)]
    assert jobs_of(shop, 2) == jobs_of(shop, 1)[:1]


async def test_two_operators_at_once_make_one_job(shop: ScratchDatabase) -> None:
    correct(shop, 2, None)
    await asyncio.gather(*(redrive(shop) for _ in range(4)))
    assert jobs_of(shop, 2) == jobs_of(shop, 1)


async def test_a_successor_that_routed_it_itself_is_not_asked_again(shop: ScratchDatabase) -> None:
    correct(shop, 2, None)
    query(
        shop.dsn,
        "insert into conductor.activations (subscription, slot, start_lsn) values (3, %s, '0/1')",
        shop.name,
    )
    assert {o.result for o in await redrive(shop)} == {"kept"}


async def test_a_message_that_could_not_be_decoded_concerns_all_of_its_time(
    shop: ScratchDatabase,
) -> None:
    (letter, *_) = letters(shop)
    query(shop.dsn, "delete from conductor.dead_letters where id > %s", letter["id"])
    query(shop.dsn, "delete from conductor.jobs")
    query(shop.dsn, "update conductor.dead_letters set subscription = null")
    late = subscribe(shop.dsn, "public.t", task="late")
    async with running(shop):
        await captured(shop, late)
    (outcome,) = await redrive(shop)
    assert (outcome.result, outcome.jobs) == ("routed", 1)
    assert len(jobs_of(shop, 1)) == 1
    assert jobs_of(shop, late) == []
    (kept,) = letters(shop)  # and who fails at it has a letter of its own
    assert (kept["subscription"], kept["ordinal"]) == (2, letter["ordinal"])
    assert (kept["raw"], kept["committed_at"]) == (letter["raw"], letter["committed_at"])


@pytest.mark.parametrize(
    ("raw", "relation", "words"),
    [
        (b"I\0\0", {"oid": 7}, "expected"),
        (encode(Insert(7, [b"1"])), {"oid": 7}, "Relation"),
        (encode(Insert(7, [b"1"])), None, "as it was"),
        (b'{"action":"I"}', None, "as it was"),
    ],
)
async def test_what_cannot_be_routed_is_kept(
    migrated: ScratchDatabase, raw: bytes, relation: dict[str, int] | None, words: str
) -> None:
    query(
        migrated.dsn,
        "insert into conductor.dead_letters (slot, generation, commit_lsn, ordinal, relation,"
        " error, raw) values (%s, 1, '0/100', 0, %s, 'as it was', %s)",
        migrated.name,
        json.dumps(relation) if relation else None,
        raw,
    )
    ((outcome,), (letter,)) = await redrive(migrated), letters(migrated)
    assert outcome.result == "kept"
    assert words in str(outcome.error)
    assert letter["error"] == outcome.error
    assert (await show_letter(settings_for(migrated), 1))["raw"] == raw.hex()


async def test_a_refused_job_is_put_in_again(migrated: ScratchDatabase) -> None:
    subscription = subscribe(migrated.dsn, "public.t")
    for raw in (b"{broken", b'{"op": "insert"}'):
        query(
            migrated.dsn,
            "insert into conductor.dead_letters (slot, generation, commit_lsn, ordinal,"
            " subscription, error, raw) values (%s, 4, '0/100', 7, %s, 'refused', %s)",
            migrated.name,
            subscription,
            raw,
        )
    assert [o.result for o in await redrive(migrated)] == ["kept", "routed"]
    assert [letter["raw"] for letter in letters(migrated)] == [b"{broken"]
    assert "json" in letters(migrated)[0]["error"]
    ((generation, lsn, ordinal, *_),) = jobs_of(migrated, subscription)
    assert (generation, lsn, ordinal) == (4, "0/100", 7)


async def test_a_change_that_a_job_waits_for_wakes_it(shop: ScratchDatabase) -> None:
    wanted = ChangeFilter("public", "t", frozenset({"insert"}), waits=True)
    query(shop.dsn, "delete from conductor.dead_letters where id > 1")
    query(
        shop.dsn,
        "update conductor.subscriptions set definition = %s where id = 2",
        json.dumps(wanted.to_json()),
    )
    job = value(shop.dsn, "select conductor.invoke('waiter', '{}', queue => 'default')")
    query(
        shop.dsn,
        "insert into conductor.steps (job, name, topic, fields, matched, seen_lsn)"
        " values (%s, 'wait', %s, '', '', '0/1')",
        job,
        change_topic(wanted),
    )
    assert [o.result for o in await redrive(shop)] == ["routed"]
    assert jobs_of(shop, 2) == []
    word = value(shop.dsn, "select result from conductor.steps where job = %s", job)
    assert word == json.loads(jobs_of(shop, 1)[0][-1])


async def test_the_command_line(shop: ScratchDatabase) -> None:
    ids = [str(letter["id"]) for letter in letters(shop)]
    query(shop.dsn, "update conductor.dead_letters set error = error || e'\\x1b]0;gotcha'")
    shown = cdc(shop, "dead", "list").stdout
    assert "FilterFailed" in shown
    assert "\x1b" not in shown  # it would steer the terminal
    listed = json.loads(cdc(shop, "dead", "list", "--json", "--limit", "2").stdout)
    assert [(row["task"], row["table"]) for row in listed] == [("broken", "public.t")] * 2
    assert listed == await list_letters(settings_for(shop), 2)
    letter = json.loads(cdc(shop, "dead", "show", ids[0]).stdout)
    assert (letter["op"], letter["new"]["mood"], letter["new"]["id"]) == ("insert", "sad", "1")
    assert cdc(shop, "dead", "show", "99").returncode == 78
    assert cdc(shop, "dead", "redrive").returncode == 2
    assert cdc(shop, "dead", "redrive", "--all", ids[0]).returncode == 2
    done = cdc(shop, "dead", "redrive", ids[0])
    assert (done.returncode, done.stdout.startswith(f"{ids[0]} kept: ")) == (65, True)
    assert cdc(shop, "dead", "discard", ids[0]).stdout == f"{ids[0]} discarded\n"
    correct(shop, 2, None)
    done = cdc(shop, "dead", "redrive", "--all", "--json")
    assert (done.returncode, len(json.loads(done.stdout))) == (0, len(ids) - 1)
    assert cdc(shop, "dead", "list").stdout == ""
