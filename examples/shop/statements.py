"""The shop's named statements, read once from `statements.sql`."""

from importlib.resources import files
from types import MappingProxyType
from typing import Final

from conductor.sql import parse

STATEMENTS: Final = MappingProxyType(
    parse(files("examples.shop").joinpath("statements.sql").read_text())
)
