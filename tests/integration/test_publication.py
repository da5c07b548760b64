"""The publication is brought to what is wanted, and never further."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from cdc import queries
from cdc.connection import connect_source
from cdc.errors import (
    ColumnUnknown,
    PrivilegeMissing,
    PublicationDrift,
    PublicationError,
    PublicationMissing,
    ReplicaIdentityMissing,
    TableUnknown,
)
from cdc.publication import PublicationKeeper
from cdc.wanted import Past, Wanted
from conductor.matching import ChangeFilter, Subscription
from tests.integration.sidecar import OPERATIONS, published, query, value
from tests.servers import ScratchDatabase, dsn_for

pytestmark = pytest.mark.anyio

PUBLICATION = "conductor"


def wanted(number: int, table: str, *, started: bool = False, **definition: object) -> Wanted:
    schema, name = table.split(".")
    stored = {"schema": schema, "table": name, "operations": list(OPERATIONS), **definition}
    row = {
        "id": number,
        "app": "test",
        "task": "seen",
        "trigger": table,
        "kind": "change",
        "queue": "default",
        "version": None,
        "rank": 0,
        "source": "default",
        "definition": ChangeFilter.from_json(stored).to_json(),
    }
    return Wanted(Subscription.from_row(row), started=started)


@asynccontextmanager
async def keeping(
    database: ScratchDatabase, dsn: str | None = None, *, manage: bool = True
) -> AsyncIterator[PublicationKeeper]:
    connection = await connect_source(dsn or database.source_dsn, application_name="test")
    await connection.execute("set lock_timeout = '200ms'")
    try:
        yield PublicationKeeper(PUBLICATION, connection, manage)
    finally:
        await connection.close()


def tables(database: ScratchDatabase, *names: str) -> None:
    for name in names:
        query(database.dsn, f"create table {name} (id int primary key, body text)")


async def test_creates_adds_and_drops_whole_tables(database: ScratchDatabase) -> None:
    tables(database, "a", "b", "c", "theirs")
    async with keeping(database) as keeper:
        await keeper.reconcile([])
        assert published(database) == set()
        found = await keeper.reconcile([wanted(1, "public.a"), wanted(2, "public.b")])
        assert set(found.published) == {("public", "a"), ("public", "b")}
        assert published(database) == {"public.a", "public.b"}
        query(database.source_dsn, "alter publication conductor add table theirs")
        await keeper.reconcile(
            [wanted(2, "public.b"), wanted(3, "public.c")],
            past=Past(named=[("public", name) for name in "abc"]),
        )
    assert published(database) == {"public.b", "public.c", "public.theirs"}
    assert value(database.dsn, "select pubviaroot and pubtruncate from pg_publication") is True


async def test_a_table_without_usable_identity_is_never_published(
    database: ScratchDatabase,
) -> None:
    query(database.dsn, "create table nokey (id int)")
    tables(database, "a", "nothing", "deferred")
    query(database.dsn, "alter table nothing replica identity nothing")
    query(database.dsn, "alter table deferred drop constraint deferred_pkey")
    query(database.dsn, "alter table deferred add primary key (id) deferrable")
    names = ("nokey", "nothing", "deferred")
    want = [wanted(n, f"public.{name}") for n, name in enumerate(names)]
    async with keeping(database) as keeper:
        found = await keeper.reconcile([*want, wanted(9, "public.a")])
    assert set(found.refused) == {0, 1, 2}
    assert all(isinstance(error, ReplicaIdentityMissing) for error in found.refused.values())
    assert "alter table public.nokey replica identity full" in found.refused[0].hint
    assert published(database) == {"public.a"}
    for name in names:  # and the application can still write
        query(database.dsn, f"insert into {name} values (1)")
        query(database.dsn, f"update {name} set id = 2")


async def test_a_full_or_indexed_identity_is_usable(database: ScratchDatabase) -> None:
    query(database.dsn, "create table f (id int)")
    query(database.dsn, "alter table f replica identity full")
    query(database.dsn, "create table i (id int not null)")
    query(database.dsn, "create unique index i_id on i (id)")
    query(database.dsn, "alter table i replica identity using index i_id")
    async with keeping(database) as keeper:
        found = await keeper.reconcile([wanted(1, "public.f"), wanted(2, "public.i")])
    assert not found.refused
    assert published(database) == {"public.f", "public.i"}


async def test_changed_needs_the_full_identity(database: ScratchDatabase) -> None:
    tables(database, "a")
    async with keeping(database) as keeper:
        found = await keeper.reconcile([wanted(1, "public.a", changed=["body"])])
        assert isinstance(found.refused[1], ReplicaIdentityMissing)
        assert published(database) == set()
        query(database.dsn, "alter table a replica identity full")
        found = await keeper.reconcile([wanted(1, "public.a", changed=["body"])])
    assert not found.refused


async def test_unknown_names_come_with_the_nearest(database: ScratchDatabase) -> None:
    tables(database, "orders")
    query(database.dsn, "create view seen as select * from orders")
    async with keeping(database) as keeper:
        found = await keeper.reconcile(
            [
                wanted(1, "public.order"),
                wanted(2, "public.orders", columns=["bodi"]),
                wanted(3, "public.seen"),
                wanted(4, "conductor.jobs"),
                wanted(5, "pg_catalog.pg_class"),
            ]
        )
    refused = found.refused
    assert isinstance(refused[1], TableUnknown)
    assert "did you mean public.orders?" in str(refused[1])
    assert isinstance(refused[2], ColumnUnknown)
    assert "did you mean body?" in str(refused[2])
    assert "a view" in str(refused[3])
    assert set(refused) == {1, 2, 3, 4, 5}


async def test_the_queue_itself_is_never_published(migrated: ScratchDatabase) -> None:
    async with keeping(migrated) as keeper:
        found = await keeper.reconcile([wanted(1, "conductor.jobs")])
        assert "never published" in str(found.refused[1])
        assert published(migrated) == set()
        query(migrated.source_dsn, "alter publication conductor add table conductor.jobs")
        with pytest.raises(PublicationError, match="the queue itself"):
            await keeper.reconcile([])


async def test_partitions_are_published_as_their_root(database: ScratchDatabase) -> None:
    query(database.dsn, "create table p (id int primary key) partition by range (id)")
    query(database.dsn, "create table p1 partition of p for values from (0) to (10)")
    async with keeping(database) as keeper:
        found = await keeper.reconcile([wanted(1, "public.p")])
        assert not found.refused
        assert published(database) == {"public.p"}
        query(database.dsn, "create table p2 partition of p for values from (10) to (20)")
        query(database.dsn, "alter table p2 replica identity nothing")
        found = await keeper.reconcile([wanted(1, "public.p")])
    assert "public.p2" in str(found.refused[1])


async def test_names_are_quoted(database: ScratchDatabase) -> None:
    query(database.dsn, 'create table "Odd ""name" (id int primary key)')
    async with keeping(database) as keeper:
        await keeper.reconcile([wanted(1, 'public.Odd "name')])
    assert published(database) == {'public.Odd "name'}


async def test_a_table_that_was_captured_and_is_gone_is_drift(database: ScratchDatabase) -> None:
    tables(database, "a", "b")
    before = [wanted(1, "public.a", started=True)]
    async with keeping(database) as keeper:
        await keeper.reconcile([wanted(1, "public.a")])
        query(database.source_dsn, "alter publication conductor drop table a")
        with pytest.raises(PublicationDrift, match=r"public\.a is not in it"):
            await keeper.reconcile(before)
        await keeper.reconcile(before, tolerate_drift=True)
        assert published(database) == {"public.a"}
        query(database.source_dsn, "alter publication conductor set table a where (id > 5)")
        with pytest.raises(PublicationDrift, match="row filter"):
            await keeper.reconcile(before)
        query(database.source_dsn, "drop publication conductor")
        with pytest.raises(PublicationMissing):
            await keeper.reconcile(before)


async def test_for_all_tables_is_refused(database: ScratchDatabase) -> None:
    query(database.admin_dsn, "create publication conductor for all tables")
    async with keeping(database) as keeper:
        with pytest.raises(PublicationError, match="FOR ALL TABLES"):
            await keeper.reconcile([])


async def test_a_locked_table_stops_no_other(database: ScratchDatabase) -> None:
    tables(database, "a", "b")
    async with keeping(database) as keeper:
        await keeper.reconcile([])
        with psycopg.connect(database.dsn) as holder:
            holder.execute("lock table a in share update exclusive mode")
            found = await keeper.reconcile([wanted(1, "public.a"), wanted(2, "public.b")])
        assert set(found.published) == {("public", "b")}
        found = await keeper.reconcile([wanted(1, "public.a"), wanted(2, "public.b")])
    assert set(found.published) == {("public", "a"), ("public", "b")}


async def test_a_move_that_has_no_lock_in_time_changes_nothing(database: ScratchDatabase) -> None:
    query(database.dsn, "create table a (id int)")
    want = [wanted(1, "public.a", operations=["insert"], started=True)]
    async with keeping(database) as keeper:
        await keeper.reconcile([wanted(1, "public.a", operations=["insert"])])
        assert published(database, "conductor_inserts") == {"public.a"}
        query(database.dsn, "alter table a replica identity full")
        with psycopg.connect(database.dsn) as holder:
            holder.execute("lock table a in share update exclusive mode")
            found = await keeper.reconcile(want)
        assert found.inserts == {("public", "a")}
        assert (await keeper.reconcile(want)).inserts == frozenset()
    assert published(database) == {"public.a"}
    assert published(database, "conductor_inserts") == set()


async def test_without_the_right_the_owner_is_told_what_to_run(database: ScratchDatabase) -> None:
    tables(database, "a", "b")
    query(database.admin_dsn, "create table theirs (id int primary key)")
    async with keeping(database) as keeper:
        found = await keeper.reconcile([wanted(1, "public.a"), wanted(2, "public.theirs")])
    assert isinstance(found.obstacle, PrivilegeMissing)
    assert 'add table only "public"."theirs"' in found.obstacle.hint
    assert published(database) == {"public.a"}


async def test_unmanaged_it_only_says_what_is_missing(database: ScratchDatabase) -> None:
    tables(database, "a", "b")
    async with keeping(database, manage=False) as keeper:
        with pytest.raises(PublicationError) as caught:
            await keeper.reconcile([wanted(1, "public.a")])
        assert 'create publication "conductor"' in caught.value.hint
        assert 'add table only "public"."a"' in caught.value.hint
        query(database.dsn, "create publication conductor for table a")
        query(database.dsn, "alter publication conductor set (publish_via_partition_root = true)")
        found = await keeper.reconcile([wanted(1, "public.a", started=True), wanted(2, "public.b")])
    assert found.obstacle is not None
    assert "alter publication" in found.obstacle.hint
    assert set(found.published) == {("public", "a")}


async def test_an_ordinary_role_that_owns_nothing_cannot_create(database: ScratchDatabase) -> None:
    role = f"{database.name}_plain"
    query(database.admin_dsn, f"create role {role} login password 'x'")
    try:
        dsn = dsn_for(database.source_dsn, user=role, password="x")
        async with keeping(database, dsn) as keeper:
            with pytest.raises(PrivilegeMissing) as caught:
                await keeper.reconcile([])
        assert "create publication" in caught.value.hint
    finally:
        query(database.admin_dsn, f"drop role {role}")


async def test_publication_statements_are_composed_safely(database: ScratchDatabase) -> None:
    statement = queries.start_replication('s"lot', ["a,b", "c'd"])
    async with keeping(database) as keeper:
        text = statement.as_string(keeper.connection)
    assert '"s""lot"' in text
    assert """'"a,b","c''d"'""" in text
