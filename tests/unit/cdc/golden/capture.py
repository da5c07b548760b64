"""Record what a real server sends: `python -m tests.unit.cdc.golden.capture DSN [wal2json] > FILE`.

The server needs wal_level = logical and a scratch database, which is left with the tables. Of
pgoutput: one line a CopyData payload, in hex, without keepalives. Of wal2json: what `cdc record`
writes.
"""

import asyncio
import select
import sys
from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import pq, sql
from pydantic import SecretStr

from cdc.config import Settings
from cdc.recorder import Recorder
from cdc.wire.frames import XLogData, parse_frame
from tests.unit.cdc.type_cases import SETUP, TYPE_CASES

SESSION = (
    "-c datestyle=ISO -c timezone=UTC -c intervalstyle=postgres -c extra_float_digits=3"
    " -c bytea_output=hex -c lc_monetary=C -c search_path=pg_catalog -c client_encoding=UTF8"
)
TRAFFIC: Final = (
    """
    create table shop.users (id int8 primary key, email text, note text, karma int4);
    alter table shop.users alter note set storage external;
    create table shop.events (id int4, body text);
    alter table shop.events replica identity full;
    create table shop.other (id int4 primary key);
    """,
    "create publication golden for all tables",
    "select pg_create_logical_replication_slot('golden', '{plugin}')",
    "insert into shop.users values (1, 'a@example.com', repeat('x', 3000), null), (2, '', '', 0)",
    "update shop.users set karma = 1 where id = 1",
    "update shop.users set id = 3 where id = 2",
    "delete from shop.users where id = 3",
    """
    insert into shop.events values (1, 'one');
    update shop.events set body = null;
    delete from shop.events;
    """,
    "select pg_logical_emit_message(false, 'alone', 'not transactional')",
    """
    begin;
    insert into shop.other values (1);
    savepoint s;
    insert into shop.other values (2);
    rollback to s;
    select pg_logical_emit_message(true, 'within', 'transactional');
    insert into shop.other values (3);
    commit;
    """,
    """
    alter table shop.users add column city text default 'Rome';
    insert into shop.users values (4);
    """,
    "truncate shop.users, shop.other restart identity cascade",
)


def run_traffic(dsn: str, plugin: str) -> int:
    """Make a slot and something for it to decode; return how many messages of wal2json it is."""
    types = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(f"c{i}"), sql.SQL(name))
        for i, (name, _, _) in enumerate(TYPE_CASES)
    )
    values = sql.SQL(", ").join(sql.Literal(text) for _, text, _ in TYPE_CASES)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SETUP)
        connection.execute(sql.SQL("create table shop.type_cases ({})").format(types))
        for statement in TRAFFIC:
            connection.execute(statement.replace("{plugin}", plugin).encode())
        connection.execute(sql.SQL("insert into shop.type_cases values ({})").format(values))
        connection.execute("select pg_logical_emit_message(false, 'end', '')")
        if plugin == "pgoutput":
            return 0
        connection.execute("checkpoint")  # flushes the message
        counted = connection.execute(
            "select count(*) from pg_logical_slot_peek_changes("
            "'golden', null, null, 'format-version', '2')"
        ).fetchone()
        return int(counted[0]) if counted else 0


def record(dsn: str) -> Iterator[bytes]:
    run_traffic(dsn, "pgoutput")
    yield from stream(dsn)


def record_wal2json(dsn: str) -> None:
    count = run_traffic(dsn, "wal2json")
    settings = Settings(
        source_dsn=SecretStr(dsn), slot="golden", publication="golden", plugin="wal2json"
    )
    asyncio.run(Recorder(settings, sys.stdout, limit=count).run())


def stream(dsn: str) -> Iterator[bytes]:
    connection = psycopg.connect(dsn, autocommit=True, replication="database", options=SESSION)
    try:
        wire = connection.pgconn
        started = wire.exec_(
            b"START_REPLICATION SLOT golden LOGICAL 0/0 (proto_version '1',"
            b" publication_names 'golden', messages 'true')"
        )
        if started.status != pq.ExecStatus.COPY_BOTH:
            raise SystemExit(wire.error_message.decode())
        while True:
            size, frame = wire.get_copy_data(1)
            if size == 0:
                select.select([wire.socket], [], [])
                wire.consume_input()
            elif isinstance(parsed := parse_frame(bytes(frame)), XLogData):
                yield bytes(frame)
                if parsed.payload[:1] == b"M" and b"end\0" in parsed.payload:
                    return
    finally:
        connection.close()


if __name__ == "__main__":
    if sys.argv[2:] == ["wal2json"]:
        record_wal2json(sys.argv[1])
    else:
        for recorded in record(sys.argv[1]):
            print(recorded.hex())  # noqa: T201 — the tool's output
