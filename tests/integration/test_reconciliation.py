"""`cdc plan` shows what `cdc apply` does; afterwards `cdc run` has nothing left to change."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdc.check import check
from cdc.errors import (
    CdcError,
    PrivilegeMissing,
    PublicationDrift,
    PublicationForeign,
    PublicationMissing,
    SlotBusy,
    SlotMissing,
)
from cdc.metrics import Metrics
from cdc.reconciliation import Proposal, Reconciliation
from cdc.service import Service
from cdc.slots import Loss
from conductor.migrations import migrate
from tests.integration.sidecar import (
    captured,
    cdc,
    drop_slot,
    eventually,
    published,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    stamps,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase, StartServer, dsn_for

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """Two tables that subscriptions want, one that cannot be had."""
    for name in ("a", "b"):
        query(migrated.dsn, f"create table {name} (id int primary key, body text)")
        subscribe(migrated.dsn, f"public.{name}", task=f"task_{name}")
    query(migrated.dsn, 'create table "key\nless" (id int)')
    subscribe(migrated.dsn, "public.key\nless", task="refused")
    return migrated


@pytest.fixture
def stranger(shop: ScratchDatabase) -> Iterator[str]:
    """A role that may replicate, and owns nothing."""
    role = f"{shop.name}_stranger"
    query(shop.admin_dsn, f"create role {role} login replication password 'x'")
    yield dsn_for(shop.source_dsn, user=role, password="x")
    query(shop.admin_dsn, f"drop role {role}")


async def propose(shop: ScratchDatabase, **changes: Any) -> Proposal:
    async with Reconciliation.open(settings_for(shop, **changes)) as reconciliation:
        return await reconciliation.propose()


async def apply(shop: ScratchDatabase, *, accept_gap: bool = False, **changes: Any) -> list[str]:
    async with Reconciliation.open(settings_for(shop, **changes)) as reconciliation:
        return await reconciliation.apply(accept_gap=accept_gap)


def gaps(shop: ScratchDatabase) -> list[tuple[Any, ...]]:
    rows = query(
        shop.dsn,
        "select condition, policy, closed_at is null as open, to_lsn > from_lsn as moved"
        " from conductor.gaps",
    )
    return [tuple(row.values()) for row in rows]


async def run_into(shop: ScratchDatabase, error: type[CdcError], **changes: Any) -> CdcError:
    settings = settings_for(shop, **changes)
    with pytest.raises(error) as caught:
        await Service(settings, Metrics("test", settings.slot)).run()
    return caught.value


async def test_a_plan_is_what_apply_does(shop: ScratchDatabase) -> None:
    proposal = await propose(shop)
    assert [s.split()[0] for s in proposal.statements] == ["create", "alter", "alter"]
    assert set(proposal.refused) == {"refused"}
    assert proposal.slot_command is not None
    assert (published(shop), slot_row(shop)) == (set(), None)  # nothing was changed
    done = await apply(shop)
    assert done[:-1] == proposal.statements
    assert "created at" in done[-1]
    assert published(shop) == {"public.a", "public.b"}
    after = await propose(shop)
    assert (after.statements, after.slot, after.problem) == ([], None, None)
    assert await apply(shop) == []
    async with running(shop, manage_publication=False):
        await captured(shop, 2)
        query(shop.dsn, "insert into b values (1, 'x')")
        await routed(shop, 1)


async def test_a_wrong_dsn_of_the_admin_is_named(shop: ScratchDatabase) -> None:
    done = cdc(shop, "apply", CDC_ADMIN_DSN=dsn_for(shop.source_dsn, dbname="nonesuch"))
    assert done.returncode == 78
    assert "\nhint: correct CDC_ADMIN_DSN, or the server's roles and pg_hba.conf\n" in done.stderr


async def test_a_dba_can_run_what_is_printed(shop: ScratchDatabase, stranger: str) -> None:
    variables = {"CDC_SOURCE_DSN": stranger, "CDC_QUEUE_DSN": shop.source_dsn}
    done = cdc(shop, "apply", **variables)
    assert (done.returncode, "create publication" in done.stderr) == (78, True)
    script = cdc(shop, "plan", **variables).stdout
    query(shop.admin_dsn, script)
    assert published(shop) == {"public.a", "public.b"}
    rest = cdc(shop, "plan", **variables).stdout
    assert all(line.startswith("--") for line in rest.splitlines())
    unmanaged: dict[str, Any] = {"source_dsn": stranger, "queue_dsn": shop.source_dsn}
    async with running(shop, **unmanaged, manage_publication=False):
        await captured(shop, 1)
    done = cdc(shop, "plan", **variables)
    assert (done.returncode, "-- nothing to do" in done.stdout) == (0, True)
    assert json.loads(cdc(shop, "plan", "--json", **variables).stdout)["statements"] == []


async def test_apply_has_the_rights_of_the_administrator(
    shop: ScratchDatabase, stranger: str
) -> None:
    places: dict[str, Any] = {"source_dsn": stranger, "queue_dsn": shop.source_dsn}
    with pytest.raises(PrivilegeMissing):
        await apply(shop, **places)
    await apply(shop, **places, admin_dsn=shop.admin_dsn)
    async with running(shop, **places, manage_publication=False):
        await captured(shop, 1)


async def test_an_unmanaged_publication_that_lacks_something_is_only_told(
    shop: ScratchDatabase,
) -> None:
    error = await run_into(shop, CdcError, manage_publication=False)
    assert (error.exit_code, "cdc apply" in error.hint) == (78, True)
    assert value(shop.dsn, "select count(*) from pg_publication") == 0


async def test_what_is_published_in_part_is_not_captured_until_it_is_whole(
    shop: ScratchDatabase,
) -> None:
    query(
        shop.dsn,
        "create publication conductor for table a where (id > 5), table b (id)"
        " with (publish = 'insert')",
    )
    for manage in (False, True):
        error = await run_into(shop, PublicationDrift, manage_publication=manage)
        assert (error.exit_code, "every operation" in str(error)) == (65, True)
        assert "cdc apply" in error.hint
    assert (slot_row(shop), gaps(shop)) == (None, [("publication_drift", "stop", True, None)])
    assert value(shop.dsn, "select count(*) from conductor.activations") == 0
    proposal = await propose(shop)
    assert (proposal.drift, len(proposal.misfit), len(proposal.statements)) == ([], 2, 3)
    assert "-- refused: it does not publish every operation" in cdc(shop, "plan").stdout
    assert "made by somebody else: it does not publish every" in cdc(shop, "check").stdout
    await apply(shop, admin_dsn=shop.dsn)
    assert gaps(shop) == [("publication_drift", "stop", False, None)]
    async with running(shop, manage_publication=False):
        await captured(shop, 2)
        query(shop.dsn, "insert into a values (1, 'x')")
        query(shop.dsn, "delete from a")
        assert (await routed(shop, 2))[0]["new"] == {"id": 1, "body": "x"}


async def test_drift_is_put_right_only_with_its_gap(shop: ScratchDatabase) -> None:
    async with running(shop):
        await captured(shop, 2)
    query(shop.source_dsn, "alter publication conductor drop table a")
    query(shop.source_dsn, "alter publication conductor set table b where (id > 5)")
    query(shop.dsn, "insert into a values (1, 'lost')")
    assert len((await propose(shop)).drift) == 2
    with pytest.raises(PublicationDrift) as caught:
        await apply(shop)
    assert "--accept-gap" in caught.value.hint
    assert gaps(shop) == []
    with psycopg.connect(shop.dsn) as writer:
        writer.execute("insert into a values (2, 'begun before the repair')")
        with pytest.raises(SlotBusy, match="gap stays open"):
            await apply(shop, accept_gap=True, slot_creation_deadline_s=0.3)
    assert [gap[:3] for gap in gaps(shop)] == [("publication_drift", "accept", True)]
    await apply(shop, accept_gap=True)
    assert gaps(shop) == [("publication_drift", "accept", False, True)]
    async with running(shop, manage_publication=False):
        query(shop.dsn, "insert into a values (3, 'x')")
        query(shop.dsn, "insert into b values (3, 'x')")
        await eventually(
            lambda: value(
                shop.dsn,
                "select count(*) = 2 from conductor.jobs where payload -> 'new' ->> 'id' = '3'",
            ),
            "what follows",
        )


async def test_a_drift_that_was_put_right_costs_no_slot(shop: ScratchDatabase) -> None:
    async with running(shop):
        await captured(shop, 2)
    query(shop.source_dsn, "alter publication conductor drop table a")
    service_loss = await run_into(shop, PublicationDrift)
    await apply(shop, accept_gap=True)
    before = (slot_row(shop) or {})["confirmed_flush_lsn"]
    loss = Loss(service_loss, value(shop.dsn, "select generation from conductor.progress"))
    async with Reconciliation.open(settings_for(shop)) as reconciliation:
        hands = reconciliation._connections
        assert await reconciliation._slots.recreate(hands.stream, hands.lock, loss) is None
    assert (slot_row(shop) or {})["confirmed_flush_lsn"] == before
    assert gaps(shop) == [("publication_drift", "stop", False, True)]


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_publication_that_was_gone_needs_a_new_slot(
    shop: ScratchDatabase, by_hand: bool
) -> None:
    async with running(shop):
        await captured(shop, 2)
    query(shop.source_dsn, "drop publication conductor")
    await run_into(shop, PublicationMissing)
    query(shop.dsn, "insert into a values (1, 'lost')")
    findings = await check(settings_for(shop))
    (advice,) = [f.fix or "" for f in findings if "captured before" in f.message]
    assert "--accept-gap` makes both" in advice
    assert "keeps the slot" not in advice
    if by_hand:
        for statement in (await propose(shop)).statements:
            query(shop.source_dsn, statement)
    done = await apply(shop, accept_gap=True)
    assert [line for line in done if "created anew" in line]
    assert ("publication_missing", "recreate", False, True) in gaps(shop)
    start = value(shop.dsn, "select routed_lsn::text from conductor.progress")
    ends = query(shop.dsn, "select to_lsn::text, closed_at is null from conductor.gaps")
    assert {tuple(row.values()) for row in ends} == {(start, False)}
    async with running(shop, manage_publication=False):
        await captured(shop, 2)
        query(shop.dsn, "insert into a values (2, 'x')")
        assert [job["new"]["id"] for job in await routed(shop, 1)] == [2]


async def test_a_publication_of_somebody_else_is_refused(shop: ScratchDatabase) -> None:
    query(
        shop.admin_dsn,
        "create publication conductor for table a with (publish_via_partition_root = true)",
    )
    error = await run_into(shop, PublicationForeign)
    assert (error.exit_code, 'add table only "public"."b"' in str(error)) == (65, True)
    assert (slot_row(shop), gaps(shop)) == (None, [("publication_foreign", "stop", True, None)])
    await apply(shop, admin_dsn=shop.admin_dsn)
    async with running(shop):
        await captured(shop, 2)
        query(shop.dsn, "create table c (id int primary key)")
        subscribe(shop.dsn, "public.c", task="later")
        query(shop.dsn, "insert into a values (1, 'x')")  # what is captured goes on without it
        await routed(shop, 1)
    assert stamps(shop, 4) == (None, None)


async def test_a_condition_of_the_slot_is_named_and_not_mended(shop: ScratchDatabase) -> None:
    await apply(shop)
    drop_slot(shop)
    proposal = await propose(shop)
    assert (proposal.condition, proposal.slot) == ("slot_missing", None)
    with pytest.raises(SlotMissing):
        await apply(shop)
    assert "-- slot_missing: " in cdc(shop, "plan").stdout
    assert cdc(shop, "apply").returncode == 65


@pytest.mark.pg(18)
async def test_a_slot_survives_a_failover_as_asked_for(shop: ScratchDatabase) -> None:
    async with running(shop, failover=False):
        await captured(shop, 1)
    assert (slot_row(shop) or {})["failover"] is False

    async def warnings() -> list[str]:
        return [f.message for f in await check(settings_for(shop)) if f.level == "warning"]

    assert [w for w in await warnings() if "does not survive a failover" in w]
    assert "FAILOVER true" in str((await propose(shop)).slot_command)
    async with running(shop):
        await eventually(lambda: (slot_row(shop) or {})["active_pid"], "a leader")
        with pytest.raises(SlotBusy):
            await apply(shop)
    await eventually(lambda: (slot_row(shop) or {})["active_pid"] is None, "a free slot")
    (done,) = await apply(shop)
    assert "FAILOVER true" in done
    assert (slot_row(shop) or {})["failover"] is True
    assert await warnings() == []


async def test_a_new_slot_survives_a_failover_where_that_exists(shop: ScratchDatabase) -> None:
    await apply(shop)
    slot = slot_row(shop) or {}
    has_failover = int(value(shop.dsn, "show server_version_num")) >= 170000
    assert slot.get("failover", False) is has_failover


async def test_a_server_without_a_limit_is_refused(start_server: StartServer) -> None:
    dsn = start_server(settings={"max_slot_wal_keep_size": "-1"}).dsn()
    shop = ScratchDatabase("unlimited", dsn, dsn, dsn)
    migrate(dsn)
    for command in ("run", "check", "apply"):
        done = cdc(shop, command)
        assert done.returncode == 78, command
        assert "CDC_ALLOW_UNLIMITED_WAL" in done.stdout + done.stderr
    assert query(dsn, "select from pg_replication_slots") == []
    allowed = {"CDC_ALLOW_UNLIMITED_WAL": "true"}
    assert cdc(shop, "check", **allowed).returncode == 0
    assert cdc(shop, "apply", **allowed).returncode == 0
    async with running(shop, allow_unlimited_wal=True) as (service, _):
        await eventually(lambda: service._session and service._session.state == "leading", "led")
