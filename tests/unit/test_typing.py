"""The public interface as both type checkers see it.

`tests/typing/api.py` holds what they must know and, as ignored lines, what they must refuse. Each
checker reports an ignore that it does not need, so an expected error that is none fails here.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[2]
API: Final = ROOT / "tests" / "typing" / "api.py"
CONFIG: Final = ROOT / "tests" / "typing" / "pyrightconfig.json"

_SIGNATURE: Final = "event: Invocation[SendEmail], ctx: Context[Deps]"

REFUSED: Final = (
    ("emit(user_created, OrderPlaced(total=1))", 'emit(user_created, UserCreated(email=""))'),
    ("lambda u: u.emial", "lambda u: u.email"),
    (f'wrong_result({_SIGNATURE}) -> str:\n    return ""',
     f'wrong_result({_SIGNATURE}) -> EmailSent:\n    return EmailSent("")'),
    ("event.payload.recipient", "event.payload.subject"),
    ("wrong_event(event: Emitted[OrderPlaced]", "wrong_event(event: Emitted[UserCreated]"),
)  # fmt: skip
"""Expected errors of the kinds a user makes, each with what makes it right."""


class Found(NamedTuple):
    line: int
    rule: str


def run(*command: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name(command[0])
    return subprocess.run(
        [tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )


def pyright(file: Path) -> list[Found]:
    config = json.loads(CONFIG.read_text())
    config |= {"include": [str(file)], "extraPaths": [str(ROOT)], "venvPath": str(ROOT)}
    if file != API:
        (file.parent / "pyrightconfig.json").write_text(json.dumps(config))
    done = run("pyright", "--outputjson", "--project", str(file.parent))
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 0, done.stderr
    return [
        Found(found["range"]["start"]["line"] + 1, found.get("rule", ""))
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]


def mypy(file: Path) -> list[Found]:
    options = ("--output=json", "--no-error-summary", f"--cache-dir={file.parent / '.mypy_cache'}")
    done = run("mypy", *options, str(file))
    assert done.returncode in {0, 1}, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [Found(f["line"], f["code"]) for f in found if f["severity"] == "error"]


CHECKERS: Final = {"reportUnnecessaryTypeIgnoreComment": pyright, "unused-ignore": mypy}


def test_pyright_knows_the_types_and_refuses_what_it_must() -> None:
    assert pyright(API) == []


@pytest.mark.parametrize(("rule", "check"), CHECKERS.items(), ids=["pyright", "mypy"])
def test_an_expected_error_that_is_none_is_reported(
    rule: str, check: Callable[[Path], list[Found]], tmp_path: Path
) -> None:
    source = API.read_text()
    for wrong, right in REFUSED:
        assert source.count(wrong) == 1
        source = source.replace(wrong, right)
    file = tmp_path / "api.py"
    file.write_text(source)
    found = check(file)
    assert {each.rule for each in found} == {rule}
    assert len(found) == len(REFUSED)
