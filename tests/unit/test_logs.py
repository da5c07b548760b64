"""Events of the log: every call in the source is listed, and nothing else."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.logs import EVENTS as CDC_EVENTS
from conductor import logs
from conductor.logs import EVENTS
from tools import logs_page

PROJECT = Path(__file__).resolve().parents[2]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
LOGGERS = {"_log", "_LOG", "self._log"}
NAMED_ELSEWHERE = {"subscription_refused", "publication_unchanged"}  # arguments of _say_once


def said(package: str) -> Iterator[str]:
    """What every logging call of a package says first."""
    for path in (PROJECT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value) in LOGGERS
                and isinstance(node.args[0], ast.Constant)
            ):
                yield str(node.args[0].value)


def test_every_event_of_a_worker_is_listed() -> None:
    assert {event.template for event in EVENTS} == set(said("conductor"))
    assert len({event.name for event in EVENTS}) == len(EVENTS)


def test_every_event_of_a_sidecar_is_listed() -> None:
    assert set(CDC_EVENTS) == {*said("cdc"), *NAMED_ELSEWHERE}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_fields_name_what_stands_in_the_sentence(event: logs.LogEvent) -> None:
    assert event.template.count("%") == len(event.fields)


def test_the_page_is_current() -> None:
    assert logs_page.PAGE.read_text() == logs_page.page()


def test_a_record_of_ours_has_its_name_and_its_fields() -> None:
    program = (
        "import logging\nfrom conductor import logs\nlogs.configure('info', 'auto')\n"
        "dead = 'worker %s was declared dead while it lived'\n"
        "logging.getLogger('conductor.lease').error(dead, 7)\n"
        "logging.getLogger('conductor.job').info('for %s', 'Ada', extra={'job': 3})\n"
        "logging.getLogger('other').info(dead, 7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    ours, handler, other = map(json.loads, done.stderr.splitlines())
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {
        "event": "lease_lost",
        "sentence": "worker 7 was declared dead while it lived",
        "worker": 7,
        "level": "error",
        "logger": "conductor.lease",
    }
    assert (handler["event"], handler["job"]) == ("for Ada", 3)
    assert other["event"] == "worker 7 was declared dead while it lived"


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize(
    ("package", "logger"),
    [
        ("conductor", "logging.getLogger('conductor.periodic')"),
        ("cdc", "logging.getLogger('conductor.periodic')"),
        ("cdc", "structlog.get_logger('cdc')"),
    ],
)
def test_a_traceback_shows_no_variables(package: str, logger: str, form: str) -> None:
    program = (
        "import logging, structlog\n"
        f"from {package} import logs\nlogs.configure('info', '{form}')\n"
        "def connect(dsn):\n    raise OSError('no such host')\n"
        "try:\n    connect('postgresql://me:hunter' + '2@db/shop')\n"
        f"except OSError:\n    {logger}.exception('a part failed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no such host" in done.stderr
    assert "hunter2" not in done.stderr
