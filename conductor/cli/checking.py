"""Reading what `conductor.comparison` compares an application with, and the schema of the queue."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from psycopg import AsyncConnection
from pydantic import BaseModel

from conductor.client import Conductor
from conductor.codegen.reader import read_schemas, read_tables
from conductor.codegen.rendering import render_module
from conductor.comparison import (
    Finding,
    compare_models,
    compare_module,
    compare_triggers,
    generated_schemas,
)
from conductor.definitions import Task
from conductor.errors import ConductorError, MigrationMismatch
from conductor.migrations import check_migrated
from conductor.registration import Registration, find_table
from conductor.rows import (
    DEFAULT_SOURCE,
    TableName,
    adopt,
    is_unresolved,
    source_of,
    table_name,
)
from conductor.store.registration import RegistrationStore
from conductor.supabase import class_name
from conductor.triggers import OnChange


def check_schema(dsn: str) -> list[Finding]:
    """Return what keeps workers of this version from using the queue database as it is."""
    try:
        check_migrated(dsn)
    except MigrationMismatch as error:
        return [Finding("schema conductor", str(error), error.hint)]
    return []


async def compare(connection: AsyncConnection[Any], conductor: Conductor[Any]) -> list[Finding]:
    """Return every difference, tables in order. ``connection`` is to the database of the tables.

    Those of other sources than the default one are left out.
    """
    store = RegistrationStore(connection)
    tables = [TableName(*key) for key in await store.table_keys()]
    registration = Registration(conductor.app, conductor.version, tuple(conductor.tasks.values()))
    unused = dict.fromkeys(_unresolved_models(conductor))
    if unused:
        others = {class_name(*key) for key in await store.other_relations()}
        unused = {model: None for model in unused if model.__name__ not in others}
    findings = _resolve({**unused, **registration.models_to_resolve}, tables)
    tasks = [task for task in registration.tasks if not _is_unresolved(task)]
    models = [model for model in _models(conductor, tasks) if not is_unresolved(model)]
    known = [str(table) for table in tables]
    catalog = await read_tables(connection, [table_name(model) for model in models])
    findings += compare_models(models, catalog, known)
    wanted = {
        (trigger.table.schema, trigger.table.table)
        for task in tasks
        for trigger in (*task.triggers, *task.all_waits)
        if isinstance(trigger, OnChange) and trigger.source == DEFAULT_SOURCE
    }
    facts = await store.describe_tables(sorted(wanted))
    findings += compare_triggers(tasks, facts, known)
    for module in sorted({model.__module__ for model in models}):
        findings += await _compare_module(connection, module)
    return sorted(findings, key=lambda found: (found.table, found.column or "", found.task or ""))


def _unresolved_models(conductor: Conductor[Any]) -> Iterator[type[BaseModel]]:
    """Yield the models of the database whose tables are not known yet, wanted or not."""
    for database in conductor.databases:
        if database.source == DEFAULT_SOURCE:
            yield from filter(is_unresolved, database.models)


def _resolve(
    models: Mapping[type[BaseModel], str | None], tables: list[TableName]
) -> list[Finding]:
    """Find the tables of models, each with the task that wants it, if one does."""
    findings: list[Finding] = []
    for model, task in models.items():
        try:
            adopt(model, find_table(model, task, tables))
        except ConductorError as error:
            findings.append(Finding(model.__name__, str(error), error.hint, task=task))
    return findings


def _is_unresolved(task: Task[Any, Any]) -> bool:
    return any(
        isinstance(trigger, OnChange) and trigger.model_to_resolve is not None
        for trigger in (*task.triggers, *task.all_waits)
    )


def _models(
    conductor: Conductor[Any], tasks: Iterable[Task[Any, Any]]
) -> dict[type[BaseModel], None]:
    """Return the models of the database and of triggers, each once."""
    known = dict.fromkeys(model for database in conductor.databases for model in database.models)
    for task in tasks:
        for trigger in (*task.triggers, *task.all_waits):
            if isinstance(trigger, OnChange) and trigger.model is not None:
                known[trigger.model] = None
    return {model: None for model in known if source_of(model) == DEFAULT_SOURCE}


async def _compare_module(connection: AsyncConnection[Any], module: str) -> list[Finding]:
    schemas = generated_schemas(module) if module in sys.modules else None
    if schemas is None:
        return []
    try:
        source = render_module(await read_schemas(connection, schemas), schemas)
    except ConductorError as error:
        return [Finding(module, str(error), error.hint)]
    found = compare_module(module, source)
    return [] if found is None else [found]
