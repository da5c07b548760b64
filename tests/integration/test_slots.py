"""Slot and progress: created together, compared, given up by policy. Every condition is real."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import psycopg
import pytest

from cdc.conditions import judge
from cdc.connection import Connection, connect_queue, connect_source
from cdc.errors import (
    CdcError,
    ServerBehind,
    SlotAhead,
    SlotBusy,
    SlotError,
    SlotForeign,
    SlotLost,
    SlotMissing,
    SlotTwoPhase,
    SystemChanged,
    TimelineSwitched,
)
from cdc.lsn import Lsn
from cdc.slots import Loss, SlotKeeper
from cdc.source import ReplicationStream
from conductor.migrations import migrate
from tests.integration.sidecar import drop_slot, eventually, query, slot_row, value
from tests.servers import NewDatabase, ScratchDatabase, StartServer

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Hands:
    """What a session works with."""

    keeper: SlotKeeper
    stream: ReplicationStream
    lock: Connection

    async def create(self) -> Lsn:
        return await self.keeper.create(self.stream, self.lock)

    async def judge(self) -> CdcError | None:
        return judge(await self.keeper.situation(self.stream))


@asynccontextmanager
async def hands(
    dsn: str, slot: str, *, queue_dsn: str | None = None, deadline_s: float = 20
) -> AsyncIterator[Hands]:
    source = await connect_source(dsn, application_name="test")
    queue = await connect_queue(queue_dsn or dsn, application_name="test")
    lock = await connect_queue(queue_dsn or dsn, application_name="test")
    stream = await ReplicationStream.open(dsn, application_name="test")
    try:
        yield Hands(SlotKeeper(slot, "default", source, queue, deadline_s), stream, lock)
    finally:
        for connection in (source, queue, lock):
            await connection.close()
        await stream.close()


def ours(database: ScratchDatabase) -> AbstractAsyncContextManager[Hands]:
    return hands(database.source_dsn, database.name)


def progress(database: ScratchDatabase) -> dict[str, object]:
    (row,) = query(
        database.dsn,
        "select state, generation, routed_lsn::text, acknowledged_lsn::text, system_identifier"
        " from conductor.progress where slot = %s",
        database.name,
    )
    return row


def change_progress(database: ScratchDatabase, assignment: str) -> None:
    query(database.dsn, f"update conductor.progress set {assignment}")


def write_wal(database: ScratchDatabase) -> None:
    query(database.dsn, "select pg_logical_emit_message(false, 'x', 'x')")
    query(database.dsn, "select txid_current()")


async def test_slot_and_progress_start_at_the_same_point(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        start = await our.create()
        assert await our.judge() is None
    row = progress(migrated)
    assert row["state"] == "streaming"
    assert row["routed_lsn"] == row["acknowledged_lsn"] == str(start)
    slot = slot_row(migrated)
    assert slot is not None
    assert (slot["plugin"], slot["confirmed_flush_lsn"]) == ("pgoutput", str(start))
    assert slot["two_phase"] is False


async def test_two_sidecars_create_one_slot(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as one, ours(migrated) as other:
        results = await asyncio.gather(one.create(), other.create(), return_exceptions=True)
        assert sum(isinstance(result, SlotBusy) for result in results) == 1
        assert await one.judge() is None
    assert progress(migrated)["generation"] == 1


async def test_an_open_writer_delays_creation_and_is_named(migrated: ScratchDatabase) -> None:
    query(migrated.dsn, "create table t (id int)")
    with psycopg.connect(migrated.dsn, application_name="slow writer") as writer:
        writer.execute("insert into t values (1)")
        async with hands(migrated.source_dsn, migrated.name, deadline_s=0.5) as our:
            with pytest.raises(SlotBusy) as caught:
                await our.create()
        assert str(writer.info.backend_pid) in str(caught.value)
    assert slot_row(migrated) is None
    async with ours(migrated) as our:  # what is left is taken up again
        assert progress(migrated)["state"] == "creating"
        await our.create()
    assert progress(migrated)["state"] == "streaming"


async def test_a_slot_left_between_creation_and_start_is_made_anew(
    migrated: ScratchDatabase,
) -> None:
    async with ours(migrated) as our:
        first = await our.create()
        change_progress(migrated, "state = 'creating', routed_lsn = '0/0'")
        write_wal(migrated)
        assert await our.create() > first
    assert progress(migrated)["state"] == "streaming"


async def test_a_slot_without_progress_is_foreign(migrated: ScratchDatabase) -> None:
    query(
        migrated.source_dsn,
        "select pg_create_logical_replication_slot(%s, 'pgoutput')",
        migrated.name,
    )
    async with ours(migrated) as our:
        assert isinstance(await our.judge(), SlotForeign)
        with pytest.raises(SlotForeign):
            await our.create()
    assert slot_row(migrated) is not None


async def test_a_missing_slot_is_noticed(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        await our.create()
        drop_slot(migrated)
        assert isinstance(await our.judge(), SlotMissing)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("select pg_create_logical_replication_slot(%s, 'test_decoding')", SlotForeign),
        ("select pg_create_physical_replication_slot(%s)", SlotForeign),
        ("select pg_create_logical_replication_slot(%s, 'pgoutput', false, true)", SlotTwoPhase),
    ],
)
async def test_another_kind_of_slot_is_foreign(
    migrated: ScratchDatabase, statement: str, expected: type[CdcError]
) -> None:
    async with ours(migrated) as our:
        await our.create()
        drop_slot(migrated)
        query(migrated.source_dsn, statement, migrated.name)
        try:
            assert type(await our.judge()) is expected
        finally:
            drop_slot(migrated)


async def test_a_slot_of_another_database_is_foreign(new_database: NewDatabase) -> None:
    here, there = new_database(migrated=True), new_database(migrated=True)
    async with ours(here) as our:
        await our.create()
        drop_slot(here)
        query(
            there.source_dsn, "select pg_create_logical_replication_slot(%s, 'pgoutput')", here.name
        )
        problem = await our.judge()
    assert isinstance(problem, SlotForeign)
    assert there.name in str(problem)


async def test_a_slot_advanced_by_hand_is_ahead(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        await our.create()
        write_wal(migrated)
        query(
            migrated.source_dsn,
            "select pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())",
            migrated.name,
        )
        assert isinstance(await our.judge(), SlotAhead)


async def test_progress_beyond_the_server_or_of_another_one(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        await our.create()
        change_progress(migrated, "routed_lsn = 'FFFF/0', acknowledged_lsn = 'FFFF/0'")
        assert isinstance(await our.judge(), ServerBehind)
        change_progress(migrated, "system_identifier = '1'")
        assert isinstance(await our.judge(), SystemChanged)


async def test_a_timeline_that_we_do_not_come_from(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        await our.create()
        change_progress(migrated, "timeline = 7")
        assert isinstance(await our.judge(), TimelineSwitched)


async def test_a_lost_slot_is_noticed(start_server: StartServer) -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    server = start_server(settings=settings)
    migrate(server.dsn())
    async with hands(server.dsn(), "lost") as our:
        await our.create()
        for _ in range(4):
            query(server.dsn(), "select pg_logical_emit_message(false, 'x', repeat('x', 9000000))")
            query(server.dsn(), "select pg_switch_wal()")
            query(server.dsn(), "checkpoint")
        await eventually(
            lambda: value(server.dsn(), "select wal_status from pg_replication_slots") == "lost",
            "a lost slot",
        )
        problem = await our.judge()
        assert isinstance(problem, SlotLost)
        loss = await our.keeper.open_gap(problem, policy="recreate")
        assert loss is not None
        start = await our.keeper.recreate(our.stream, our.lock, loss)
        assert start is not None
        assert await our.judge() is None
        # All that was committed before the new slot is lost, wherever the old one stood.
        ended = value(server.dsn(), "select to_lsn::text from conductor.gaps")
        assert ended == str(start)


async def test_a_new_slot_closes_the_gap(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        before = await our.create()
        drop_slot(migrated)
        problem = await our.judge()
        assert problem is not None
        loss = await our.keeper.open_gap(problem, policy="recreate")
        assert loss == Loss(problem, 1)
        await our.keeper.open_gap(problem, policy="recreate")  # a restart adds no second row
        write_wal(migrated)
        start = await our.keeper.recreate(our.stream, our.lock, loss)
        assert start is not None
        assert start > before
        assert await our.keeper.recreate(our.stream, our.lock, loss) is None  # somebody did it
        assert await our.judge() is None
    (gap,) = query(
        migrated.dsn, "select *, from_lsn::text as a, to_lsn::text as b from conductor.gaps"
    )
    assert (gap["condition"], gap["policy"]) == ("slot_missing", "recreate")
    assert (gap["a"], gap["b"]) == (str(before), str(start))
    assert gap["closed_at"] is not None
    assert progress(migrated)["generation"] == 2


def gap(database: ScratchDatabase) -> tuple[object, ...]:
    (row,) = query(
        database.dsn,
        "select condition, policy, closed_at is null as open, to_lsn = from_lsn as unharmed"
        " from conductor.gaps",
    )
    return tuple(row.values())


async def test_a_loss_that_is_over_costs_no_slot(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        start = await our.create()
        change_progress(migrated, "routed_lsn = 'FFFF/0', acknowledged_lsn = 'FFFF/0'")
        problem = await our.judge()
        assert isinstance(problem, ServerBehind)
        loss = await our.keeper.open_gap(problem, policy="recreate")
        assert loss is not None
        # As if the server had replayed meanwhile.
        change_progress(migrated, f"routed_lsn = '{start}', acknowledged_lsn = '{start}'")
        write_wal(migrated)
        assert await our.keeper.recreate(our.stream, our.lock, loss) is None
    assert (slot_row(migrated) or {})["confirmed_flush_lsn"] == str(start)
    row = progress(migrated)
    assert (row["generation"], row["state"], row["routed_lsn"]) == (1, "streaming", str(start))
    assert gap(migrated) == ("server_behind", "recreate", False, True)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("select pg_create_logical_replication_slot(%s, 'test_decoding')", SlotForeign),
        ("select pg_create_logical_replication_slot(%s, 'pgoutput')", SlotAhead),
    ],
)
async def test_another_condition_than_the_accepted_one_drops_nothing(
    migrated: ScratchDatabase, statement: str, expected: type[CdcError]
) -> None:
    async with ours(migrated) as our:
        await our.create()
        drop_slot(migrated)
        problem = await our.judge()
        assert problem is not None
        loss = await our.keeper.open_gap(problem, policy="recreate")
        assert loss is not None
        write_wal(migrated)
        query(migrated.source_dsn, statement, migrated.name)
        before = slot_row(migrated)
        with pytest.raises(expected):
            await our.keeper.recreate(our.stream, our.lock, loss)
    assert slot_row(migrated) == before
    row = progress(migrated)
    assert (row["generation"], row["state"]) == (1, "streaming")
    assert gap(migrated)[:3] == ("slot_missing", "recreate", True)


async def test_another_system_is_no_reason_to_drop_what_is_not_ours(
    migrated: ScratchDatabase,
) -> None:
    async with ours(migrated) as our:
        await our.create()
        drop_slot(migrated)
        query(
            migrated.source_dsn,
            "select pg_create_logical_replication_slot(%s, 'test_decoding')",
            migrated.name,
        )
        change_progress(migrated, "system_identifier = '1'")
        loss = Loss(SystemChanged("another"), 1)
        with pytest.raises(SlotForeign):
            await our.keeper.recreate(our.stream, our.lock, loss)
    assert (slot_row(migrated) or {})["plugin"] == "test_decoding"


async def test_two_sidecars_accept_one_loss_once(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as one, ours(migrated) as other:
        await one.create()
        drop_slot(migrated)
        problem = await one.judge()
        assert problem is not None
        loss = await one.keeper.open_gap(problem, policy="recreate")
        assert loss is not None
        results = await asyncio.gather(
            *(our.keeper.recreate(our.stream, our.lock, loss) for our in (one, other)),
            return_exceptions=True,
        )
        for result in results:
            assert result is None or isinstance(result, Lsn | SlotBusy)
        assert sum(isinstance(result, Lsn) for result in results) == 1
        assert await other.keeper.recreate(other.stream, other.lock, loss) is None
    assert progress(migrated)["generation"] == 2


async def test_what_is_not_ours_is_not_dropped_to_create_our_slot(
    new_database: NewDatabase,
) -> None:
    here, there = new_database(migrated=True), new_database(migrated=True)
    for dsn, plugin in ((here.source_dsn, "test_decoding"), (there.source_dsn, "pgoutput")):
        async with ours(here) as our:
            if slot_row(here) is None:
                await our.create()
                drop_slot(here)
            change_progress(here, "state = 'creating', routed_lsn = '0/0'")
            query(dsn, "select pg_create_logical_replication_slot(%s, %s)", here.name, plugin)
            assert isinstance(await our.judge(), SlotForeign)
            with pytest.raises(SlotForeign):
                await our.create()
        assert (slot_row(here) or {})["plugin"] == plugin
        drop_slot(here)


async def test_a_slot_in_use_is_not_dropped_to_create_ours(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as user, ours(migrated) as our:
        query(migrated.source_dsn, "create publication conductor")
        await user.create()
        await user.stream.start(migrated.name, ["conductor"])
        change_progress(migrated, "state = 'creating', routed_lsn = '0/0'")
        with pytest.raises(SlotBusy, match="is active for PID"):
            await our.create()
    assert slot_row(migrated) is not None


async def test_slots_are_not_recreated_without_end(migrated: ScratchDatabase) -> None:
    async with ours(migrated) as our:
        await our.create()
        for generation in range(1, 5):
            loss = Loss(SlotMissing("gone"), generation)
            drop_slot(migrated)
            await our.keeper.open_gap(loss.error, policy="recreate")
            if generation < 4:
                await our.keeper.recreate(our.stream, our.lock, loss)
            else:
                with pytest.raises(SlotError, match="3 times within an hour"):
                    await our.keeper.recreate(our.stream, our.lock, loss)


async def test_an_unmigrated_queue_is_a_matter_of_configuration(
    database: ScratchDatabase,
) -> None:
    async with ours(database) as our:
        with pytest.raises(CdcError) as caught:
            await our.create()
    assert caught.value.exit_code == 78
    assert "conductor migrate" in caught.value.hint
