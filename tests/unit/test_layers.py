"""The layers of the design: import-linter's contracts, and what `cdc` may use of `conductor`."""

import re
import subprocess
import sys
from pathlib import Path

import grimp

PROJECT = Path(__file__).resolve().parents[2]
SHARED_WITH_CDC = {
    f"conductor.{name}"
    for name in (
        "contract",
        "dsn",
        "filters",
        "gauges",
        "health",
        "logins",
        "logs",
        "matching",
        "tracing",
        "values",
    )
}


def test_contracts_are_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=PROJECT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cdc_uses_only_the_shared_modules_of_conductor() -> None:
    graph = grimp.build_graph("cdc", "conductor", cache_dir=None)
    used = {
        (importer, imported)
        for importer in graph.modules
        if importer.partition(".")[0] == "cdc"
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.partition(".")[0] == "conductor"
    }
    assert {pair for pair in used if pair[1] not in SHARED_WITH_CDC} == set()
    assert {imported for _, imported in used} == SHARED_WITH_CDC, "shared, and not used"


def test_the_page_for_contributors_lists_what_is_shared() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    named = re.search(r"`cdc` shares ([^;.]+) of `conductor`", text)
    assert named is not None
    assert re.findall(r"`(\w+)`", named[1]) == sorted(
        name.removeprefix("conductor.") for name in SHARED_WITH_CDC
    )
