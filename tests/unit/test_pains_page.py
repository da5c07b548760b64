"""docs/pains.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "pains.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`((?:unit/|e2e/)?[\w/]+\.py)`", PAGE.read_text())
    files = {name: TESTS / (name if "/" in name else f"integration/{name}") for name in named}
    assert len(files) > 10
    assert [name for name, path in files.items() if not path.is_file()] == []
    code = "\n".join(path.read_text() for path in files.values())
    starts = re.findall(r"`(\w+)…`|`([a-z_]{12,})`\)", PAGE.read_text())
    tests = [first or whole for first, whole in starts]
    assert len(tests) > 10
    assert [name for name in tests if f"def test_{name}" not in code] == []
