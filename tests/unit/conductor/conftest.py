"""The fixtures that applications use as well."""

from __future__ import annotations

from conductor.testing.plugin import rehearsal

__all__ = ["rehearsal"]
