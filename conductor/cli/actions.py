"""What the commands do: settings in, plain data out. Nothing here prints.

Raises ConductorError for whatever has a name; what the server says is put into one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection
from pydantic import SecretStr

from conductor import migrations
from conductor.cli.checking import check_schema, compare
from conductor.cli.loading import load_conductor, load_orchestrator
from conductor.codegen.reader import read_schemas
from conductor.codegen.rendering import render_module
from conductor.comparison import Finding
from conductor.config import PREFIX, Settings
from conductor.contract import INTERNAL_QUEUE
from conductor.enqueue import JobBatch, check_option, hint_queue
from conductor.errors import (
    ConfigError,
    DatabaseUnavailable,
    MigrationMismatch,
    OptionInvalid,
    PrivilegeMissing,
    UnknownEvent,
    UnknownTask,
    did_you_mean,
)
from conductor.logins import login_refused
from conductor.metrics import STATES
from conductor.migrations import Migration
from conductor.store.operations import OperationStore, Row
from conductor.store.overview import read_overview
from conductor.store.sessions import Backoff, connection_settings, prepare
from conductor.texts import TextInvalid, check_value
from conductor.tracing import export

T = TypeVar("T")

_LISTED: Final = (*STATES, "completed", "failed", "cancelled")
_ORCHESTRATOR: Final = (
    "metrics_host",
    "slots",
    "transactions",
    "dead_after_s",
    "drain_timeout_s",
    "connect_timeout_s",
)


async def run_worker(path: str, settings: Settings) -> None:
    """Run an orchestrator until a signal, with what the settings say in place of its own."""
    if settings.dsn is not None:  # a secret file's, too: applications look in the environment
        os.environ[f"{PREFIX}DSN"] = settings.conninfo
    orchestrator = load_orchestrator(path)
    export("conductor")  # unless the application has seen to it itself
    if settings.metrics_port is not None:
        orchestrator.metrics_port = None if settings.metrics_port < 0 else settings.metrics_port
    for name in _ORCHESTRATOR:
        value = getattr(settings, name)
        if value is not None:
            setattr(orchestrator, name, value)
    if settings.listen_dsn is not None:
        orchestrator.listen_dsn = settings.listen_dsn.get_secret_value()
    if settings.source_dsn is not None:
        orchestrator.conductor.source_dsn = settings.source_dsn.get_secret_value()
    orchestrator.conductor.sources |= {
        name: dsn.get_secret_value() for name, dsn in settings.sources.items()
    }
    _spare_the_collector()
    await orchestrator.run(settings.wait_captured_s)


def _spare_the_collector() -> None:
    """Let the garbage collector look at what lives on less often: a job leaves no cycles behind.

    It took an eighth of a busy worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def migrate(settings: Settings) -> tuple[Migration, ...]:
    """Apply what is pending, waiting for the database for a while, and return it."""
    return _patiently(settings, migrations.migrate)


def pending(settings: Settings) -> tuple[Migration, ...]:
    """Return the migrations that would be applied."""
    return _patiently(settings, migrations.pending_migrations)


async def invoke(
    settings: Settings, task: str, payload: str, *, app: str | None, **options: Any
) -> int | None:
    """Enqueue a job and return its id; None when the dedupe key is taken.

    With ``app`` (MODULE:conductor) its definitions check the payload. Raises UnknownTask,
    PayloadInvalid.
    """
    value = _parse(payload)
    _check_options(task, **options)
    if app is not None:
        async with load_conductor(app) as conductor:
            handle = await conductor.invoke(task, value, **options)
        return handle.id if handle.status == "enqueued" else None
    async with _connected(settings) as (connection, store):
        queue = await store.task_queue(task)
        if queue is None:
            raise UnknownTask(task, await store.task_names(), hint=UnknownTask.hint)
        try:
            job = await store.invoke_task(task, payload, **options)
        except psycopg.errors.InvalidParameterValue as error:  # what an ordered task cannot have
            raise OptionInvalid(_line(error), hint=error.diag.message_hint) from error
        await hint_queue(connection, queue)
    return job


def _check_options(
    task: str, *, run_at: datetime | None, priority: int, key: str | None, dedupe_key: str | None
) -> None:
    """Raise OptionInvalid for what no job can have."""
    JobBatch(
        queue="",
        task=task,
        payloads=[b""],
        run_at=run_at,
        priority=priority,
        keys=[key],
        dedupe_keys=[dedupe_key or ""],
    )


async def emit(settings: Settings, event: str, payload: str, *, app: str | None) -> None:
    """Emit an event. ``app`` as for `invoke`. Raises UnknownEvent, PayloadInvalid."""
    value = _parse(payload)
    if app is not None:
        async with load_conductor(app) as conductor:
            await conductor.emit(event, value)
        return
    async with _connected(settings) as (connection, store):
        known = await store.event_names()
        if event not in known:
            raise UnknownEvent(event, known)
        await store.emit_event(event, payload)
        await hint_queue(connection, INTERNAL_QUEUE)


async def read_top(settings: Settings) -> Row:
    """Return what `conductor top` shows; see `conductor.store.overview`."""
    async with _connected(settings) as (connection, _):
        return await read_overview(connection)


async def list_jobs(settings: Settings, **filters: Any) -> list[Row]:
    """Return the newest jobs. Raises OptionInvalid for an unknown state."""
    state = filters.get("state")
    if state is not None and state not in _LISTED:
        raise OptionInvalid(
            f"unknown state {state!r}{did_you_mean(state, _LISTED)}",
            hint=f"One of {', '.join(_LISTED)}.",
        )
    async with _connected(settings) as (_, store):
        return await store.list_jobs(**filters)


async def list_schedules(settings: Settings, task: str | None, limit: int) -> list[Row]:
    """Return schedules, the next first."""
    async with _connected(settings) as (_, store):
        return await store.list_schedules(task=task, limit=limit)


async def show_job(settings: Settings, job: int) -> Row:
    """Return everything about a job. Raises OptionInvalid when it is not known."""
    async with _connected(settings) as (_, store):
        found = await store.show_job(job)
        if found is None:
            raise _no_job(job)
        return {**found, "steps": await store.show_steps(job)}


async def retry_job(settings: Settings, job: int) -> int:
    """Enqueue a failed or cancelled job again; returns the new job's id."""
    async with _connected(settings) as (connection, store):
        ended = await store.ended_job(job)
        if ended is None:
            if await store.show_job(job) is None:
                raise _no_job(job)
            raise OptionInvalid(f"job {job} has not ended", hint="Its own attempts go on.")
        outcome, metadata = ended
        kept = metadata if isinstance(metadata, dict) else {"metadata": metadata}
        if metadata is None:
            kept = {}
        retried = await store.retry_job(job, {**kept, "retry_of": job})
        if retried is None:
            raise OptionInvalid(
                f"job {job} is {outcome}", hint="Only failed and cancelled jobs run again."
            )
        await hint_queue(connection, retried[1])
    return retried[0]


async def cancel_job(settings: Settings, job: int, reason: str | None) -> None:
    """Cancel a job. Raises OptionInvalid when it has ended or is not known."""
    check_option("reason", reason)
    async with _connected(settings) as (_, store):
        if await store.cancel_job(job, reason):
            return
        if await store.show_job(job) is None:
            raise _no_job(job)
        raise OptionInvalid(f"job {job} has ended already", hint="See `conductor jobs show`.")


async def list_lanes(settings: Settings, *, task: str | None, limit: int) -> list[Row]:
    """Return the lanes that are halted."""
    async with _connected(settings) as (_, store):
        return await store.halted_lanes(task, limit)


async def resume_lane(settings: Settings, task: str, key: str) -> None:
    """Let a lane go on. Raises OptionInvalid when it is not halted."""
    async with _connected(settings) as (connection, store):
        if not await store.resume_lane(task, key):
            raise OptionInvalid(
                f"no lane {key!r} of task {task!r} is halted", hint="See `conductor lanes list`."
            )
        queue = await store.task_queue(task)
        if queue is not None:
            await hint_queue(connection, queue)


async def generate_models(settings: Settings, schemas: Sequence[str]) -> str:
    """Return the source of row models for the tables of some schemas. Raises UnknownSchema."""
    async with _connected(settings) as (connection, _):
        return render_module(await read_schemas(connection, schemas), schemas)


async def check(settings: Settings, path: str, db_url: str | None) -> list[Finding]:
    """Return every difference between an application and the database of its tables.

    Without ``db_url`` that is the queue's, whose schema must be what this version needs.
    """
    if settings.dsn is not None:  # a secret file's, too: applications look in the environment
        os.environ[f"{PREFIX}DSN"] = settings.conninfo
    async with load_conductor(path) as conductor:
        dsn = SecretStr(db_url or conductor.dsn)
        async with _connected(settings.model_copy(update={"dsn": dsn})) as (connection, _):
            missing = [] if db_url else await asyncio.to_thread(check_schema, conductor.dsn)
            return [*missing, *await compare(connection, conductor)]


def parse_instant(text: str | None) -> datetime | None:
    """Read an instant of the command line. Raises OptionInvalid for one without a zone."""
    if text is None:
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        instant = datetime.min  # noqa: DTZ901 - refused below
    if instant.tzinfo is None:
        raise OptionInvalid(
            f"{text!r} is no instant", hint="Such as 2026-01-31T09:00:00+01:00, with its zone."
        )
    return instant


def _parse(payload: str) -> Any:
    try:
        value = json.loads(payload)
        check_value(value)
    except TextInvalid as error:
        raise OptionInvalid(f"the payload: {error}", hint=error.hint) from error
    except ValueError as error:
        raise OptionInvalid(
            f"the payload is not JSON: {error}", hint="Quote it for the shell: '{\"id\": 1}'."
        ) from error
    return value


def _no_job(job: int) -> OptionInvalid:
    return OptionInvalid(
        f"there is no job {job}", hint="It was never there, or its history is no longer kept."
    )


_NOT_MIGRATED: Final = (
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
)
"""What the server says of a schema that is not there, or is an older one."""


@asynccontextmanager
async def _connected(
    settings: Settings,
) -> AsyncIterator[tuple[AsyncConnection[Any], OperationStore]]:
    """Lend one connection, and name what goes wrong with it."""
    dsn = settings.conninfo
    try:
        connection = await AsyncConnection.connect(dsn, **connection_settings(dsn, "conductor cli"))
        await prepare(connection)
    except psycopg.OperationalError as error:
        if refused := login_refused(error):
            raise refused from error
        raise DatabaseUnavailable(f"cannot connect to the database: {_line(error)}") from error
    try:
        async with connection:
            yield connection, OperationStore(connection)
    except psycopg.errors.InsufficientPrivilege as error:
        raise PrivilegeMissing(_line(error)) from error
    except _NOT_MIGRATED as error:
        raise MigrationMismatch(f"the schema conductor is not current: {_line(error)}") from error
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(f"lost the database: {_line(error)}") from error


def _patiently(settings: Settings, action: Callable[[str], T]) -> T:
    """Do something that needs the database, trying for ``connect_timeout_s``."""
    deadline, backoff = time.monotonic() + settings.connect_timeout_s, Backoff()
    while True:
        try:
            return action(settings.conninfo)
        except DatabaseUnavailable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(backoff.delay_s())
        except psycopg.errors.InsufficientPrivilege as error:
            raise ConfigError(
                _line(error),
                hint="Migrate as the role that owns the database, or has CREATE on it.",
            ) from error


def _line(error: psycopg.Error) -> str:
    """Return what the server or the driver says, without the place in a statement."""
    return " ".join((error.diag.message_primary or str(error)).split())
