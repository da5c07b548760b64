"""docs/settings.md, from the settings classes of the two programs: `python -m tools.settings_page`.

What a setting means is the docstring under it, so the page cannot say anything else than the code.
"""

import ast
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic_settings import BaseSettings

from cdc.config import Settings as CdcSettings
from conductor.config import Settings as ConductorSettings

PAGE: Final = Path(__file__).parent.parent / "docs" / "settings.md"
_HEAD: Final = """\
# Settings

Both programs read, in this order: options of the command line, environment variables, secret files,
a TOML file, defaults. `CDC_SECRETS_DIR` and `CONDUCTOR_SECRETS_DIR` name a folder with one file per
setting (mounted secrets); `CDC_CONFIG` and `CONDUCTOR_CONFIG` name a TOML file whose keys are the
names below without their prefix, in small letters. A connection string never appears in a log with
its password.

This page is made by `python -m tools.settings_page`.
"""


def descriptions(settings: type[BaseSettings]) -> dict[str, str]:
    """Return the docstrings of a class' attributes."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    found = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def table(title: str, prefix: str, settings: type[BaseSettings]) -> str:
    """Return the section of one program."""
    said = descriptions(settings)
    lines = [f"## `{title}`", "", "| setting | default | |", "|---|---|---|"]
    for name, field in settings.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else _default(field.get_default(call_default_factory=True))
        )
        lines.append(f"| `{prefix}{name.upper()}` | {default} | {said.get(name, '')} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is None:
        return "the application's"
    if isinstance(value, SecretStr):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    """Return the page."""
    return "\n".join(
        (
            _HEAD,
            table("cdc", "CDC_", CdcSettings),
            table("conductor", "CONDUCTOR_", ConductorSettings),
        )
    )


if __name__ == "__main__":
    PAGE.write_text(page())
