"""Fixtures for pytest: ``pytest_plugins = ["conductor.testing.plugin"]`` in a conftest.py."""

from __future__ import annotations

import pytest

from conductor.testing.rehearsal import Rehearsal


@pytest.fixture
def rehearsal() -> Rehearsal:
    """Runs handlers with no database."""
    return Rehearsal()
