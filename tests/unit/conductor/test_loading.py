from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conductor.cli.loading import load_object
from conductor.errors import ConfigError


@pytest.mark.parametrize(
    ("source", "error", "place"),
    [
        ("\nraise KeyError('x')\n", "KeyError: 'x'", "It was raised in {}, line 2."),
        ("import json\njson.loads('{')\n", "JSONDecodeError: ", "It was raised in {}, line 2."),
        (
            "from conductor import TableRow\n\n\nTableRow.id\n",
            "AttributeError: id",
            "It was raised in {}, line 4.",
        ),
        ("import psycopg\n\npsycopg.connect('x y')\n", "", "It was raised in {}, line 3."),
        ("\n\ndef f(:\n", "SyntaxError: ", "It is in {}, line 3."),
    ],
)
def test_an_import_that_fails_names_the_line_of_the_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str, place: str
) -> None:
    name = f"app_{abs(hash(source))}"
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigError) as caught:
        load_object(name, "orchestrator")
    assert str(caught.value).startswith(f"cannot import {name}: {error}")
    assert caught.value.hint == place.format(file)
