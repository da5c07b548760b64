"""The pages on servers: the SQL of the general one works, and what they say of settings is so."""

import asyncio
import re
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdc.catalog import read_server
from cdc.check import check
from cdc.config import Settings
from cdc.connection import connect_source
from conductor.migrations import migrate
from tests.deploy.kustomize import PROJECT
from tests.servers import Cluster, ScratchDatabase, StartServer

PAGES = PROJECT / "docs" / "postgres"
GENERAL = PAGES / "README.md"
VARIABLE = re.compile(r"\bCDC_[A-Z_]+\b")
LINK = re.compile(r"\]\(([\w.-]+\.md)(?:#([\w-]+))?\)")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language in a page."""
    found = re.findall(
        rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [str(block) for block in found]


def run_script(dsn: str, script: str) -> None:
    """Run statements one by one, as psql would."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in script.split(";"):
            connection.execute(statement.encode())


def test_the_roles_are_enough(start_server: StartServer) -> None:
    server = start_server(settings={"max_slot_wal_keep_size": "20GB"})
    settings, roles, *others = blocks(GENERAL, "sql")
    for script in (settings, roles):
        run_script(server.dsn(), script)
    migrate(server.dsn("shop", "app"))
    found = asyncio.run(check(Settings(source_dsn=server.dsn("shop", "cdc"))))
    assert [finding for finding in found if finding.level != "ok"] == []
    for script in others:
        run_script(server.dsn("shop"), script)
    for role, may in (("app", True), ("public", False)):
        assert may_emit(server.dsn("shop"), role) is may


def may_emit(dsn: str, role: str) -> bool:
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "select has_function_privilege(%s, 'conductor.emit_wal(text, json, json)', 'execute')",
            [role],
        )
        return found.fetchone() == (True,)


@pytest.mark.pg(18)
def test_a_slot_of_ours_can_be_made_a_failover_slot(migrated: ScratchDatabase) -> None:
    command = re.search(r'-c "(ALTER_REPLICATION_SLOT [^"]+)"', GENERAL.read_text())
    assert command is not None
    slot = f"s_{migrated.name}"
    with psycopg.connect(migrated.source_dsn, autocommit=True) as connection:
        connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        with psycopg.connect(
            f"{migrated.source_dsn}&replication=database", autocommit=True
        ) as replication:
            replication.execute(command[1].replace("conductor", slot).encode())
        found = connection.execute(
            "select failover from pg_replication_slots where slot_name = %s", [slot]
        )
        assert found.fetchone() == (True,)


def test_membership_in_rds_replication_is_the_right_to_replicate(
    server: Cluster, database: ScratchDatabase
) -> None:
    if server_has_role(database, "rds_replication"):
        pytest.fail("the server is RDS: the test would change its roles")
    owner = sql.Identifier(server.owner_role)

    def may_replicate() -> bool:
        async def read() -> bool:
            connection = await connect_source(database.dsn, application_name="test")
            async with connection:
                return (await read_server(connection)).can_replicate

        return asyncio.run(read())

    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        assert not may_replicate()
        connection.execute("create role rds_replication")
        try:
            assert not may_replicate()
            connection.execute(sql.SQL("grant rds_replication to {}").format(owner))
            assert may_replicate()
        finally:
            connection.execute("drop role rds_replication")


def server_has_role(database: ScratchDatabase, role: str) -> bool:
    with psycopg.connect(database.admin_dsn) as connection:
        found = connection.execute("select from pg_roles where rolname = %s", [role])
        return found.fetchone() is not None


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    settings = {f"CDC_{name.upper()}" for name in Settings.model_fields}
    assert set(VARIABLE.findall(text)) <= settings
    for target, anchor in LINK.findall(text):
        headings = re.findall(r"^#+ (.+)$", (PAGES / target).read_text(), re.MULTILINE)
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}


def test_every_page_is_reached_from_the_general_one() -> None:
    reached = {target for target, _ in LINK.findall(GENERAL.read_text())}
    assert reached == {page.name for page in PAGES.glob("*.md")} - {GENERAL.name}
