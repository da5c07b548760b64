"""The mounted files, laid out as the kubelet lays them, read by the programs' own settings."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

import cdc.config
import conductor.config
from tests.deploy.kustomize import (
    KUBERNETES,
    PROJECT,
    Manifest,
    combine,
    containers,
    copy_tree,
    name_of,
    pod_specs,
    render_overlay,
)
from tests.servers import ScratchDatabase, StartServer

SECRETS = {
    "cdc-database": {"cdc_source_dsn": "postgresql://cdc:s3cret@db/shop"},
    "conductor-database": {"conductor_dsn": "postgresql://shop:s3cret@db/shop"},
}


def mount(folder: Path, data: Mapping[str, str]) -> Path:
    """A volume as the kubelet writes it: links to the files of a folder that is replaced as one."""
    (folder / "..2026_01_01").mkdir(parents=True)
    (folder / "..data").symlink_to("..2026_01_01")
    for name, text in data.items():
        (folder / "..data" / name).write_text(text)
        (folder / name).symlink_to(Path("..data") / name)
    return folder


def environment_of(
    manifests: tuple[Manifest, ...] | list[Manifest], owner: str, name: str, root: Path
) -> dict[str, str]:
    """A container's variables, with its volumes mounted below a folder instead of the root."""
    spec = next(spec for where, _, spec in pod_specs(manifests) if where == owner)
    container = next(c for c in containers(spec) if c["name"] == name)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    data_of = {name_of(m): m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    for mounted in container["volumeMounts"]:
        volume = volumes[mounted["name"]]
        folder = root / mounted["mountPath"].lstrip("/")
        if "configMap" in volume:
            mount(folder, data_of[f"ConfigMap {volume['configMap']['name']}"])
        elif "secret" in volume:
            mount(folder, SECRETS[volume["secret"]["secretName"]])
    return {
        entry["name"]: f"{root}{entry['value']}"
        if entry["value"].startswith("/")
        else entry["value"]
        for entry in container.get("env", ())
    }


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("CDC_", "CONDUCTOR_"))]:
        monkeypatch.delenv(name)


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("overlay", "owner"), [("prod", "Deployment cdc"), ("dev", "Deployment shop")]
)
def test_the_sidecar_reads_its_files(
    overlay: str, owner: str, tmp_path: Path, no_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = render_overlay(overlay)
    set_environment(monkeypatch, environment_of(manifests, owner, "cdc", tmp_path))
    settings = cdc.config.load()
    assert settings.source_conninfo == SECRETS["cdc-database"]["cdc_source_dsn"]
    assert settings.queue_conninfo == settings.source_conninfo
    assert (settings.log_format, settings.gap_policy) == ("json", "stop")


@pytest.mark.parametrize(
    ("owner", "container", "port"),
    [("Deployment conductor-worker", "worker", 9464), ("Job conductor-migrate", "migrate", None)],
)
def test_the_sdk_reads_its_files(
    owner: str,
    container: str,
    port: int | None,
    tmp_path: Path,
    no_settings: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = environment_of(render_overlay("prod"), owner, container, tmp_path)
    set_environment(monkeypatch, variables)
    settings = conductor.config.load()
    assert settings.conninfo == SECRETS["conductor-database"]["conductor_dsn"]
    assert settings.metrics_port == port


def test_the_mounted_dsn_reaches_the_application(tmp_path: Path) -> None:
    variables = environment_of(
        render_overlay("prod"), "Deployment conductor-worker", "worker", tmp_path
    )
    (tmp_path / "application.py").write_text(
        "import os, psycopg.conninfo\n"
        "parts = psycopg.conninfo.conninfo_to_dict(os.environ['CONDUCTOR_DSN'])\n"
        "raise RuntimeError(f\"the host is {parts['host']}\")\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "conductor", "worker", "application:orchestrator"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": os.environ["PATH"], **variables},
        capture_output=True,
        check=False,
        text=True,
    )
    assert "the host is db" in done.stderr
    assert done.returncode == 78
    assert "s3cret" not in done.stderr


# --- what the scaler asks ---------------------------------------------------------------------


@pytest.fixture
def scaler_query(tmp_path: Path) -> str:
    manifests = combine(copy_tree(tmp_path), ["cdc-deployment", "keda"])
    scaled: Any = next(m for m in manifests if m["kind"] == "ScaledObject")["spec"]
    query: str = scaled["triggers"][0]["metadata"]["query"]
    return query


@pytest.fixture
def scaler_role(migrated: ScratchDatabase) -> Iterator[str]:
    """A role of this test alone, with the rights of role.sql."""
    role = f"keda_{migrated.name}"
    statements = (KUBERNETES / "components" / "keda" / "role.sql").read_text()
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {}").format(sql.Identifier(role)))
        with psycopg.connect(migrated.dsn) as owner:
            owner.execute(statements.replace(" to keda;", f" to {role};").encode())
        yield role
        for statement in ("drop owned by {}", "drop role {}"):
            connection.execute(sql.SQL(statement).format(sql.Identifier(role)))


JOB = "insert into conductor.jobs (queue, task, payload, state, worker, run_at) "
SCHEDULE = (
    "insert into conductor.schedules (app, task, name, queue, expression, timezone, next_at) "
    "values ('a', 't', 'n', 'q', '* * * * *', 'UTC', now() + interval '{}')"
)
RESTING = (  # made at run time, for a task that nobody has registered: no worker fires it
    "insert into conductor.schedules (app, task, name, queue, expression, timezone, next_at, "
    "payload) values ('', 't', 'n', 'q', '* * * * *', 'UTC', now(), '{}')"
)


NEEDS: Mapping[str, int] = {
    "select": 0,
    JOB + "values ('q', 't', '{}', 'ready', null, now())": 1,
    JOB + "values ('q', 't', '{}', 'suspect', null, now())": 1,
    JOB + "values ('q', 't', '{}', 'running', 1, now())": 1,
    JOB + "values ('q', 't', '{}', 'scheduled', null, now() + '1 hour')": 0,
    JOB + "values ('q', 't', '{}', 'scheduled', null, now() - interval '1 s')": 1,
    JOB + "values ('q', 't', '{}', 'waiting', null, 'infinity')": 0,
    JOB + "values ('q', 't', '{}', 'parked', null, now())": 0,
    "insert into conductor.lane_calls (queue, task, key) values ('q', 't', 'k')": 1,
    "insert into conductor.wakeups (job, step) values (1, 'paid')": 1,
    SCHEDULE.format("1 hour"): 0,
    SCHEDULE.format("-1 s"): 1,
    RESTING: 0,
    JOB + "select 'q', 't', '{}', 'ready', null, now() from generate_series(1, 10100)": 10_000,
}
"""How much the scaler must count after each statement."""


def test_the_scaler_counts_what_needs_a_worker(
    migrated: ScratchDatabase, scaler_query: str, scaler_role: str
) -> None:
    found = {}
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as connection:
        for statement in NEEDS:
            with connection.transaction(force_rollback=True):
                connection.execute(statement.encode())
                connection.execute(sql.SQL("set role {}").format(sql.Identifier(scaler_role)))
                row = connection.execute(scaler_query.encode()).fetchone()
                found[statement] = row and row[0]
    assert found == NEEDS


def test_the_scaler_reads_no_job(migrated: ScratchDatabase, scaler_role: str) -> None:
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("set role {}").format(sql.Identifier(scaler_role)))
        for statement in (b"select payload from conductor.jobs", b"select * from conductor.job"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


# --- the roles of the overlay dev and of compose -----------------------------------------------


@pytest.mark.pg(18)  # the version of the overlay and of compose
def test_the_roles_of_the_shop_can_do_their_work(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    where = conninfo_to_dict(server.dsn())
    (tmp_path / "cdc_password").write_text("ev'ry $thing\\")
    environment = {
        "PATH": f"{server.binaries.bindir}:{os.environ['PATH']}",
        "PGHOST": str(where["host"]),
        "PGPORT": str(where["port"]),
        "POSTGRES_SHOP_PASSWORD": "a b",
        "POSTGRES_CDC_PASSWORD_FILE": str(tmp_path / "cdc_password"),
    }
    script = PROJECT / "deploy" / "postgres" / "roles.sh"
    subprocess.run(["bash", "-eu", script], env=environment, check=True, stdout=subprocess.DEVNULL)
    with psycopg.connect(server.tcp_dsn("shop", "shop", "a b"), autocommit=True) as connection:
        connection.execute("create table public.users (id bigint primary key)")
    cdc_dsn = server.tcp_dsn("shop", "cdc", "ev'ry $thing\\")
    with psycopg.connect(cdc_dsn, autocommit=True) as connection:
        connection.execute("create publication conductor for table public.users")
        connection.execute(
            "select pg_create_logical_replication_slot('conductor', 'pgoutput', true)"
        )
        found = connection.execute("select rolsuper from pg_roles where rolname = current_user")
        assert found.fetchone() == (False,)
