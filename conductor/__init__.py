"""Typed tasks and events for PostgreSQL: declare, invoke, emit, schedule and run them durably.

The names below are the public interface. They are imported when first used, so that a package of
definitions does not load a database driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conductor.definitions import (
        EventDefinition,
        Task,
        TaskDefinition,
        define_event,
        define_task,
    )
    from conductor.errors import ConductorError, NonRetryable
    from conductor.job import JobHandle, JobInfo
    from conductor.retry import RetryPolicy

__all__ = [
    "ConductorError",
    "EventDefinition",
    "JobHandle",
    "JobInfo",
    "NonRetryable",
    "RetryPolicy",
    "Task",
    "TaskDefinition",
    "define_event",
    "define_task",
]

_MODULES = {
    "definitions": ("EventDefinition", "Task", "TaskDefinition", "define_event", "define_task"),
    "errors": ("ConductorError", "NonRetryable"),
    "job": ("JobHandle", "JobInfo"),
    "retry": ("RetryPolicy",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
