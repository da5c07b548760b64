"""Finding an application's objects by name: ``MODULE:attribute``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from sysconfig import get_path
from traceback import extract_tb
from typing import Any, Final

from conductor.client import Conductor
from conductor.errors import ConductorError, ConfigError, nearest
from conductor.orchestrator import Orchestrator

_OURS: Final = Path(__file__).parents[1]
_LIBRARIES: Final = {get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_NAME_HINT: Final = "Give MODULE:NAME, the module as in an import, not as a file: shop.tasks:app."
_ABSENT_HINT: Final = "Run this in the module's folder, or install its package here."


def load_object(path: str, default: str) -> Any:
    """Import ``MODULE:attribute`` from the current folder or the installed packages.

    Raises ConfigError, which says where an import failed.
    """
    name, _, attribute = path.partition(":")
    if not name or name.startswith(".") or "/" in name:
        raise ConfigError(f"{path!r} names no module", hint=_NAME_HINT)
    if "" not in sys.path:
        sys.path.insert(0, "")  # and it stays: the application may import more later
    try:
        module = import_module(name)
    except ConductorError as error:  # a declaration is wrong: say which
        error.hint = f"{error.hint} {_place(error)}".lstrip()
        raise
    except Exception as error:
        is_absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(
            f"{error.name}."
        )
        absent_hint = _NAME_HINT if name.endswith(".py") else _ABSENT_HINT
        raise ConfigError(
            f"cannot import {name}: {type(error).__name__}: {error}",
            hint=absent_hint if is_absent else _place(error),
        ) from error
    found: Any = module
    for part in (attribute or default).split("."):
        if not hasattr(found, part):
            similar = nearest(part, vars(found)) if hasattr(found, "__dict__") else []
            raise ConfigError(
                f"module {name} has no {part!r}",
                hint=f"Did you mean {' or '.join(similar)}?" if similar else "Give MODULE:NAME.",
            )
        found = getattr(found, part)
    return found


def _place(error: Exception) -> str:
    """Return which line of the application an error comes from, if need be of a library."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"It is in {error.filename}, line {error.lineno}."
    frames = extract_tb(error.__traceback__)
    theirs = [each for each in frames if not Path(each.filename).is_relative_to(_OURS)] or frames
    frame = ([each for each in theirs if not _is_of_library(each.filename)] or theirs)[-1]
    return f"It was raised in {frame.filename}, line {frame.lineno}."


def _is_of_library(filename: str) -> bool:
    """Return whether a file is Python's own, or that of an installed package."""
    return filename.startswith("<frozen ") or any(map(Path(filename).is_relative_to, _LIBRARIES))


def load_orchestrator(path: str) -> Orchestrator:
    """Import an orchestrator; a conductor is as good: all its tasks. Raises ConfigError."""
    found = load_object(path, "orchestrator")
    if isinstance(found, Conductor):
        return Orchestrator(found)
    if not isinstance(found, Orchestrator):
        raise ConfigError(
            f"{path} is {type(found).__name__}, not an orchestrator",
            hint="Such as orchestrator = Orchestrator(conductor, tasks=[…]).",
        )
    return found


def load_conductor(path: str) -> Conductor[Any]:
    """Import a conductor, or take an orchestrator's. Raises ConfigError."""
    found = load_object(path, "conductor")
    if isinstance(found, Orchestrator):
        return found.conductor
    if not isinstance(found, Conductor):
        raise ConfigError(
            f"{path} is {type(found).__name__}, not a conductor",
            hint="Such as conductor = Conductor(dsn, tasks=[…]).",
        )
    return found
