"""The public interface as pyright sees it; mypy reads the same file with all others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def pyright(*, on: Path) -> list[dict[str, Any]]:
    command = [
        str(Path(sys.executable).with_name("basedpyright")),
        "--outputjson",
        "--project",
        str(on),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 0, done.stderr
    found: list[dict[str, Any]] = report["generalDiagnostics"]
    return [diagnostic for diagnostic in found if diagnostic["severity"] == "error"]


def test_pyright_knows_the_types_and_refuses_what_it_must() -> None:
    assert pyright(on=ROOT / "tests" / "typing") == []


def test_pyright_reports_an_expected_error_that_is_none(tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests/typing/pyrightconfig.json").read_text())
    config |= {"include": [str(tmp_path)], "extraPaths": [str(ROOT)], "venvPath": str(ROOT)}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    source = (ROOT / "tests/typing/api.py").read_text()
    refused = "emit(user_created, OrderPlaced(total=1))"
    assert refused in source
    (tmp_path / "api.py").write_text(
        source.replace(refused, 'emit(user_created, UserCreated(email=""))')
    )
    rules = [error["rule"] for error in pyright(on=tmp_path)]
    assert rules == ["reportUnnecessaryTypeIgnoreComment"]
