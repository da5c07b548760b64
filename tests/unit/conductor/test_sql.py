from __future__ import annotations

from importlib.resources import files

import pytest

from conductor.sql import load, parse


def test_comments_are_not_sent() -> None:
    text = (
        "-- a file\n\n-- name: one\n-- 100% a comment\nselect 1\n  -- in\nfrom t;\n"
        "\n-- name: two\nselect 2"
    )
    assert parse(text) == {"one": b"select 1\nfrom t", "two": b"select 2"}


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        "-- name: one\n-- nothing\n",
        "-- name: a b\nselect 1",
        "-- name: a\nx\n-- name: a\ny",
    ],
)
def test_a_malformed_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"statement|name|twice"):
        parse(text)


def test_every_query_file_loads() -> None:
    groups = [entry.name for entry in files("conductor.sql").joinpath("queries").iterdir()]
    assert groups
    for name in groups:
        assert load(name.removesuffix(".sql"))
