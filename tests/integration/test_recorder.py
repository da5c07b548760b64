"""`cdc record` and `cdc decode` on real servers: nothing is acknowledged, everything is shown."""

import asyncio
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cdc.recorder import Recorder
from cdc.recording import read
from cdc.replay import replay
from tests.integration.sidecar import (
    captured,
    cdc,
    drop_slot,
    environment,
    eventually,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

TABLES = """
    create domain cents as int8;
    create table users (id int8 primary key, note text, price cents, at timestamptz);
    alter table users alter note set storage external;
"""
TRAFFIC = (
    "insert into users values (1, repeat('x', 9000), 5, '2026-01-02 03:04:05+01')",
    "update users set price = 6",
    "update users set id = 2",
    "select pg_logical_emit_message(true, 'app', 'hello')",
    "delete from users",
    "truncate users",
)
LEFT = "select count(*) from pg_replication_slots where database = current_database()"


def decoded(database: ScratchDatabase, file: Path) -> list[dict[str, Any]]:
    result = cdc(database, "decode", str(file), "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def events(file: Path) -> list[str]:
    """What a recording holds so far."""
    with file.open() as lines:
        header, entries = read(lines)
        return [line["op"] for line in replay(header, entries)]


async def test_an_interrupt_ends_a_recording(migrated: ScratchDatabase, tmp_path: Path) -> None:
    query(migrated.source_dsn, "create publication conductor")
    file = tmp_path / "recording"
    recorder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cdc", "record", str(file), "--temporary"),
        env=environment(migrated),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await eventually(lambda: file.exists() and file.stat().st_size, "the header")
        recorder.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(recorder.communicate(), 60)
    except BaseException:
        recorder.kill()
        raise
    assert recorder.returncode == 0, errors
    assert b"messages recorded" in errors


@pytest.mark.wal2json
async def test_both_plugins_decode_to_the_same(migrated: ScratchDatabase, tmp_path: Path) -> None:
    query(migrated.dsn, TABLES)
    query(migrated.source_dsn, "create publication conductor for table users")
    plugins = ("pgoutput", "wal2json")
    with ExitStack() as stack:
        recorders = [
            Recorder(
                settings_for(migrated, plugin=plugin, slot=plugin),
                stack.enter_context((tmp_path / plugin).open("w")),
                temporary=True,
            )
            for plugin in plugins
        ]
        tasks = [asyncio.create_task(recorder.run()) for recorder in recorders]
        await eventually(lambda: all(f.stat().st_size for f in tmp_path.iterdir()), "headers")
        for statement in TRAFFIC:
            query(migrated.dsn, statement)
        await eventually(
            lambda: all(events(tmp_path / p)[-2:] == ["truncate", "commit"] for p in plugins),
            "the recordings",
        )
        for recorder in recorders:
            recorder.stop()
        await asyncio.gather(*tasks)
    # The server drops a temporary slot a moment after the connection has ended.
    await eventually(lambda: value(migrated.dsn, LEFT) == 0, "the end of the slots")
    pgoutput, wal2json = (decoded(migrated, tmp_path / plugin) for plugin in plugins)
    once: list[dict[str, Any]] = []
    for event in pgoutput:  # pgoutput describes a table again when it was truncated
        if event["op"] != "relation" or event not in once:
            once.append(event)
    assert wal2json == once
    assert [e["op"] for e in pgoutput if e["op"] not in {"begin", "commit", "relation"}] == [
        *("insert", "update", "update", "message", "delete", "truncate")
    ]
    inserted = next(e for e in pgoutput if e["op"] == "insert")
    assert inserted["new"] | {"note": ""} == {
        "id": 1,
        "note": "",
        "price": 5,
        "at": "2026-01-02T02:04:05+00:00",
    }


async def watched(database: ScratchDatabase, file: Path, position: str) -> None:
    """Record until the server has been told that what is beyond a position was received."""
    with file.open("w") as output:
        recorder = Recorder(settings_for(database), output, status_every_s=0.02)
        task = asyncio.create_task(recorder.run())
        told = (
            "select count(*) from pg_stat_replication where application_name = 'cdc record'"
            " and write_lsn > %s"
        )
        await eventually(lambda: value(database.admin_dsn, told, position), "a status")
        recorder.stop()
        await task
    await eventually(lambda: (slot_row(database) or {})["active_pid"] is None, "the slot's release")


async def test_nothing_is_acknowledged(migrated: ScratchDatabase, tmp_path: Path) -> None:
    query(migrated.dsn, TABLES)
    async with running(migrated):
        await captured(migrated, subscribe(migrated.dsn, "public.users", ["insert"]))
        busy = cdc(migrated, "record", str(tmp_path / "busy"))
        assert (busy.returncode, "slot" in busy.stderr) == (69, True), busy.stderr
    query(migrated.dsn, "insert into users values (1), (2)")
    before = slot_row(migrated)
    assert before is not None
    await watched(migrated, tmp_path / "watched", str(before["confirmed_flush_lsn"]))
    file = tmp_path / "recording"
    for _ in range(2):  # the second one gets all of it again
        result = cdc(migrated, "record", str(file), "--messages", "6")
        assert result.returncode == 0, result.stderr
        shown = [e for e in decoded(migrated, file) if e["op"] == "insert"]
        assert [e["new"]["id"] for e in shown] == [1, 2]
    after = slot_row(migrated)
    assert file.stat().st_mode & 0o077 == 0  # rows are in it
    assert after is not None
    assert after["confirmed_flush_lsn"] == before["confirmed_flush_lsn"]
    text = cdc(migrated, "decode", str(file)).stdout
    assert "insert public.users" in text
    async with running(migrated):
        await routed(migrated, 2)
    drop_slot(migrated)


async def test_a_file_that_is_no_recording(migrated: ScratchDatabase, tmp_path: Path) -> None:
    file = tmp_path / "other"
    file.write_text("{}\n")
    result = cdc(migrated, "decode", str(file))
    assert result.returncode == 65
    assert result.stderr.startswith("error: ")
    for path, why in (("missing", "No such file or directory"), (".", "Is a directory")):
        refused = cdc(migrated, "decode", str(tmp_path / path))
        assert refused.returncode == 78
        assert refused.stderr.startswith(f"error: cannot open {tmp_path / path}: {why}\n")


async def test_a_slot_that_is_not_there_yet(migrated: ScratchDatabase, tmp_path: Path) -> None:
    result = cdc(migrated, "record", str(tmp_path / "recording"))
    assert result.returncode == 65
    assert "does not exist\nhint: `cdc run` makes the slot" in result.stderr
