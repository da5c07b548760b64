"""`cdc slot`: afterwards slot, progress and gaps agree, and a sidecar goes on from there."""

import json
import re
from typing import Any

import pytest

from cdc.errors import ConfigError, ServerDecodeError, SlotBusy, SlotForeign, SlotMissing
from cdc.lsn import Lsn
from cdc.metrics import Metrics
from cdc.service import Service
from cdc.slot_operations import drop_slot, list_slots, skip_to
from tests.integration.sidecar import (
    ascii_shop,
    captured,
    cdc,
    eventually,
    jobs,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    stamps,
    subscribe,
    value,
)
from tests.integration.sidecar import drop_slot as drop_by_hand
from tests.servers import ScratchDatabase, StartServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database whose slot has routed one change; nobody runs."""
    query(migrated.dsn, "create table t (id int primary key, body text)")
    subscribe(migrated.dsn, "public.t", ["insert"])
    async with running(migrated):
        await captured(migrated, 1)
        insert(migrated, 1)
        await routed(migrated, 1)
    return migrated


def insert(shop: ScratchDatabase, *ids: int) -> None:
    for number in ids:
        query(shop.dsn, "insert into t values (%s, 'x')", number)


def ids(shop: ScratchDatabase) -> list[int]:
    return [payload["new"]["id"] for payload in jobs(shop)]


def gaps(shop: ScratchDatabase) -> list[dict[str, Any]]:
    return query(
        shop.dsn,
        "select condition, policy, from_lsn::text, to_lsn::text, closed_at is null as open"
        " from conductor.gaps order by id",
    )


def progress(shop: ScratchDatabase) -> dict[str, Any] | None:
    rows = query(
        shop.dsn,
        "select routed_lsn::text, acknowledged_lsn::text, epoch, generation"
        " from conductor.progress",
    )
    return rows[0] if rows else None


def now(shop: ScratchDatabase) -> str:
    return str(value(shop.admin_dsn, "select pg_current_wal_flush_lsn()::text"))


async def run_into(shop: ScratchDatabase, error: type[Exception]) -> Exception:
    settings = settings_for(shop)
    with pytest.raises(error) as caught:
        await Service(settings, Metrics("test", settings.slot)).run()
    return caught.value


async def test_a_dropped_slot_is_gone_with_its_progress(shop: ScratchDatabase) -> None:
    before = progress(shop)
    assert before is not None
    insert(shop, 2)
    end = await drop_slot(settings_for(shop), shop.name)
    assert (slot_row(shop), progress(shop), stamps(shop, 1)) == (None, None, (None, None))
    assert gaps(shop) == [
        {
            "condition": "slot_dropped",
            "policy": "drop",
            "from_lsn": before["routed_lsn"],
            "to_lsn": end,
            "open": False,
        }
    ]
    async with running(shop):  # like the first one
        await captured(shop, 1)
        insert(shop, 3)
        await routed(shop, 2)
    assert ids(shop) == [1, 3]
    after = progress(shop)
    assert after is not None
    assert after["generation"] > before["generation"]


async def test_what_is_in_use_or_not_ours_is_not_dropped(shop: ScratchDatabase) -> None:
    foreign = f"{shop.name}_foreign"
    query(shop.source_dsn, "select pg_create_logical_replication_slot(%s, 'pgoutput')", foreign)
    with pytest.raises(SlotForeign):
        await drop_slot(settings_for(shop), foreign)
    with pytest.raises(SlotForeign):
        await drop_slot(settings_for(shop), "nonesuch")
    async with running(shop):
        await eventually(lambda: (slot_row(shop) or {})["active_pid"], "a leader")
        with pytest.raises(SlotBusy, match="is active for PID"):
            await drop_slot(settings_for(shop), shop.name)
        with pytest.raises(SlotBusy):
            await skip_to(settings_for(shop), shop.name, Lsn.parse(now(shop)))
        insert(shop, 2)
        await routed(shop, 2)
    assert gaps(shop) == []


async def test_a_slot_that_is_gone_already_is_dropped_with_its_gap(shop: ScratchDatabase) -> None:
    drop_by_hand(shop)
    await run_into(shop, SlotMissing)
    await drop_slot(settings_for(shop), shop.name)
    assert [(g["condition"], g["policy"], g["open"]) for g in gaps(shop)] == [
        ("slot_missing", "drop", False),
        ("slot_dropped", "drop", False),
    ]
    assert progress(shop) is None


async def test_a_skip_stays_between_progress_and_the_servers_end(shop: ScratchDatabase) -> None:
    before = progress(shop)
    assert before is not None
    routed_lsn = Lsn.parse(before["routed_lsn"])
    for position in (Lsn(routed_lsn - 1), Lsn(1 << 60)):
        with pytest.raises(ConfigError, match="is not between"):
            await skip_to(settings_for(shop), shop.name, position)
    assert (progress(shop), gaps(shop)) == (before, [])
    insert(shop, 2)
    to = now(shop)
    insert(shop, 3)
    for _ in range(2):  # a crash in the middle of it: again
        assert await skip_to(settings_for(shop), shop.name, Lsn.parse(to)) == to
    after = progress(shop)
    assert after is not None
    assert (after["routed_lsn"], after["acknowledged_lsn"]) == (to, to)
    assert after["epoch"] > before["epoch"]
    assert gaps(shop) == [
        {
            "condition": "server_decode_error",
            "policy": "skip",
            "from_lsn": before["routed_lsn"],
            "to_lsn": to,
            "open": False,
        }
    ]
    async with running(shop):
        await routed(shop, 2)
    assert ids(shop) == [1, 3]


async def test_exactly_what_the_server_cannot_decode_is_skipped(start_server: StartServer) -> None:
    shop = ascii_shop(start_server())
    async with running(shop):
        await captured(shop, 1)
    insert(shop, *range(1, 300))
    query(shop.dsn, "insert into t values (300, convert_from('\\xff', 'SQL_ASCII'))")
    insert(shop, 301, 302)
    error = await run_into(shop, ServerDecodeError)
    assert ids(shop) == list(range(1, 300))  # all that came before it
    assert isinstance(error, ServerDecodeError)
    command = re.search(r"cdc (slot skip \S+ --to \S+)$", error.hint)
    assert command is not None
    done = cdc(shop, *command[1].split())
    assert (done.returncode, done.stderr) == (0, "")
    (gap,) = gaps(shop)
    assert (gap["condition"], gap["policy"], gap["open"]) == ("server_decode_error", "skip", False)
    async with running(shop):
        await routed(shop, 301)
    assert ids(shop) == [n for n in range(1, 303) if n != 300]


@pytest.mark.pg(15)
async def test_in_pieces_the_place_of_what_cannot_be_decoded_is_not_known_yet(
    start_server: StartServer,
) -> None:
    shop = ascii_shop(start_server(settings={"logical_decoding_work_mem": "64kB"}))
    async with running(shop):
        await captured(shop, 1)
    query(
        shop.dsn,
        "insert into t select i, case i when 3000 then convert_from('\\xff', 'SQL_ASCII')"
        " else 'x' end from generate_series(1, 6000) i",
    )
    settings = settings_for(shop, streaming="on")
    with pytest.raises(ServerDecodeError) as caught:
        await Service(settings, Metrics("test", shop.name)).run()
    assert "CDC_STREAMING=off" in caught.value.hint
    assert "stream_change" in str(caught.value)
    error = await run_into(shop, ServerDecodeError)
    assert isinstance(error, ServerDecodeError)
    assert re.search(r"cdc slot skip ascii --to \S+$", error.hint)


async def test_the_list_names_conditions(shop: ScratchDatabase) -> None:
    foreign = f"{shop.name}_foreign"
    query(shop.source_dsn, "select pg_create_logical_replication_slot(%s, 'pgoutput')", foreign)

    async def found() -> dict[str, dict[str, Any]]:
        rows = await list_slots(settings_for(shop))
        return {row["slot"]: row for row in rows if row["slot"].startswith(shop.name)}

    rows = await found()
    assert [(name, row["ours"], row["condition"]) for name, row in rows.items()] == [
        (shop.name, True, None),
        (foreign, False, None),
    ]
    drop_by_hand(shop)
    assert (await found())[shop.name]["condition"] == "slot_missing"
    done = cdc(shop, "slot", "list")
    assert f"error: {shop.name}: slot_missing: slot" in done.stdout
    assert f"ok: {foreign}: not ours" in done.stdout
    listed = json.loads(cdc(shop, "slot", "list", "--json").stdout)
    assert (await found())[foreign] in listed


async def test_the_command_line(shop: ScratchDatabase) -> None:
    assert cdc(shop, "slot", "skip", shop.name, "--to", "soon").returncode == 2
    assert cdc(shop, "slot", "skip", shop.name, "--to", "0/1").returncode == 78
    done = cdc(shop, "slot", "drop", shop.name)
    assert (done.returncode, done.stdout.startswith(f"slot {shop.name} is dropped")) == (0, True)
    done = cdc(shop, "slot", "drop", shop.name)
    assert (done.returncode, "no progress" in done.stderr) == (65, True)
