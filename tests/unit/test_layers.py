"""The layers of the design: import-linter's contracts, and what `cdc` may use of `conductor`."""

import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

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


@pytest.mark.parametrize("package", ["cdc", "conductor"])
def test_the_page_for_contributors_has_every_module_below_what_it_imports(package: str) -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    table = text.partition(f"**`{package}`, ")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[2]) for line in table.splitlines()[2:]]
    row_of = {name: number for number, names in enumerate(rows) for name in names}
    graph = grimp.build_graph(package, cache_dir=None)
    modules = {name.split(".")[1] for name in graph.modules if "." in name} - {"__main__"}
    listed = sorted(name for names in rows for name in names)
    assert listed == sorted(modules), "CONTRIBUTING.md says of each module once what it is"
    upwards = {
        (importer, imported)
        for importer in modules
        for imported in _imported_by(graph, f"{package}.{importer}")
        if row_of[imported] > row_of[importer]
    }
    assert upwards == set()


def _imported_by(graph: grimp.ImportGraph, module: str) -> set[str]:
    """What a module, or any within it, imports of its package: names of its first level."""
    package = module.partition(".")[0]
    return {
        imported.split(".")[1]
        for importer in {module} | graph.find_descendants(module)
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.startswith(f"{package}.")
    }
