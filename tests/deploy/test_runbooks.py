"""One page an alert, complete, whose statements run."""

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.main import get_command

from cdc.cli import app as cdc_app
from cdc.config import Settings as CdcSettings
from conductor.cli import app as conductor_app
from conductor.config import Settings as ConductorSettings
from tests.deploy.test_alerts import alerts
from tests.servers import ScratchDatabase
from tools.monitoring.__main__ import PROJECT

RUNBOOKS = PROJECT / "deploy" / "runbooks"
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
SQL_BLOCK = re.compile(r"```sql\n(.*?)```", re.DOTALL)
PROGRAMS = {"cdc": cdc_app, "conductor": conductor_app}
PAGES = {path.stem: path for path in sorted(RUNBOOKS.glob("*.md")) if path.stem != "README"}


def title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


def blocks(path: Path) -> list[str]:
    """The statements of a page."""
    return SQL_BLOCK.findall(path.read_text())


def test_one_page_an_alert_and_nothing_else() -> None:
    pages = {f"deploy/runbooks/{path.name}": title(path) for path in PAGES.values()}
    expected = {alert["annotations"]["runbook"]: name for name, alert in alerts().items()}
    assert pages == expected


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_complete(page: str) -> None:
    text = PAGES[page].read_text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == SECTIONS
    alert = alerts()[title(PAGES[page])]
    wait = f"for {alert['for']}" if "for" in alert else "at once"
    dashboard = alert["annotations"]["dashboard"].removeprefix("pgconductor-")
    severity = alert["labels"]["severity"]
    assert f"Severity: {severity}, {wait}. Dashboard: {dashboard}." in text
    diagnosis = text.partition("## Diagnosis")[2].partition("## Mitigation")[0]
    assert SQL_BLOCK.search(diagnosis), "no statement to look with"
    for statement in blocks(PAGES[page]):
        assert re.match(r"-- on the (source|queue database)[;\n]", statement), statement
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        headings = re.findall(r"^#+ (.+)$", (RUNBOOKS / target).read_text(), re.MULTILINE)
        anchors = ["", *(heading.lower().replace(" ", "-") for heading in headings)]
        assert anchor in anchors, link


def test_the_index_lists_every_page() -> None:
    linked = re.findall(r"\]\((\S+)\.md\)", (RUNBOOKS / "README.md").read_text())
    assert sorted(linked) == sorted(PAGES)


def test_commands_that_pages_name_exist() -> None:
    text = "".join(path.read_text() for path in PAGES.values())
    named = {tuple(found.split()) for found in re.findall(r"`((?:conductor|cdc) [a-z ]+)", text)}
    assert len(named) > 5
    for program, *words in named:
        command: Any = get_command(PROGRAMS[program])
        for word in words:
            commands = getattr(command, "commands", {})
            assert word in commands, f"{program} {words}"
            command = commands[word]


def test_settings_that_pages_name_exist() -> None:
    text = "".join(path.read_text() for path in PAGES.values())
    named = set(re.findall(r"\b(?:CDC|CONDUCTOR)_[A-Z_]+\b", text))
    known = {f"CDC_{name.upper()}" for name in CdcSettings.model_fields}
    known |= {f"CONDUCTOR_{name.upper()}" for name in ConductorSettings.model_fields}
    assert named
    assert named <= known


def test_the_statements_run(migrated: ScratchDatabase) -> None:
    """As the sidecar's role, which owns the schema through its membership; nothing is kept."""
    failed = {}
    for page, path in PAGES.items():
        for statement in blocks(path):
            dsn = migrated.admin_dsn if "needs pg_monitor" in statement else migrated.source_dsn
            try:
                with psycopg.connect(dsn) as connection:
                    connection.execute(statement.encode())
                    connection.rollback()
            except psycopg.Error as error:
                failed[page] = f"{statement}\n{error}"
    assert failed == {}
