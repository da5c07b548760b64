"""Typed tasks and events for PostgreSQL: declare, invoke, emit, schedule and run them durably.

The names below are the public interface. They are imported when first used, so that a package of
definitions does not load a database driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conductor.batch_context import BatchContext
    from conductor.client import Conductor
    from conductor.context import Context
    from conductor.definitions import (
        Batch,
        EventDefinition,
        Task,
        TaskDefinition,
        define_event,
        define_task,
    )
    from conductor.errors import (
        BatchFailed,
        ChildCancelled,
        ChildFailed,
        ChildTimeout,
        ConductorError,
        NonRetryable,
        StepFailed,
        WaitTimeout,
    )
    from conductor.events import (
        Change,
        Delete,
        Emitted,
        Insert,
        Invocation,
        Tick,
        Transaction,
        Truncate,
        Update,
        is_event,
    )
    from conductor.job import JobHandle, JobInfo
    from conductor.orchestrator import Orchestrator
    from conductor.retry import RetryPolicy
    from conductor.rows import Database, TableRow
    from conductor.sync import SyncConductor
    from conductor.sync_context import SyncContext
    from conductor.triggers import Cron, Invocable, OnChange, OnEvent
    from conductor.types import Bytea

__all__ = [
    "Batch",
    "BatchContext",
    "BatchFailed",
    "Bytea",
    "Change",
    "ChildCancelled",
    "ChildFailed",
    "ChildTimeout",
    "Conductor",
    "ConductorError",
    "Context",
    "Cron",
    "Database",
    "Delete",
    "Emitted",
    "EventDefinition",
    "Insert",
    "Invocable",
    "Invocation",
    "JobHandle",
    "JobInfo",
    "NonRetryable",
    "OnChange",
    "OnEvent",
    "Orchestrator",
    "RetryPolicy",
    "StepFailed",
    "SyncConductor",
    "SyncContext",
    "TableRow",
    "Task",
    "TaskDefinition",
    "Tick",
    "Transaction",
    "Truncate",
    "Update",
    "WaitTimeout",
    "define_event",
    "define_task",
    "is_event",
]

_MODULES = {
    "batch_context": ("BatchContext",),
    "client": ("Conductor",),
    "context": ("Context",),
    "definitions": (
        "Batch", "EventDefinition", "Task", "TaskDefinition", "define_event", "define_task",
    ),
    "errors": (
        "BatchFailed", "ChildCancelled", "ChildFailed", "ChildTimeout", "ConductorError",
        "NonRetryable", "StepFailed", "WaitTimeout",
    ),
    "events": (
        "Change", "Delete", "Emitted", "Insert", "Invocation", "Tick", "Transaction", "Truncate",
        "Update", "is_event",
    ),
    "job": ("JobHandle", "JobInfo"),
    "orchestrator": ("Orchestrator",),
    "retry": ("RetryPolicy",),
    "rows": ("Database", "TableRow"),
    "sync": ("SyncConductor",),
    "sync_context": ("SyncContext",),
    "triggers": ("Cron", "Invocable", "OnChange", "OnEvent"),
    "types": ("Bytea",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
