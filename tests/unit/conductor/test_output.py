"""What the commands print for people: no text of a job's is obeyed by the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from conductor.cli import output

EVIL = "\x1b]0;gotcha\x07\x1b[2J\u009b31m\u202e"
JOB: dict[str, Any] = {
    "id": 7,
    "task": f"task {EVIL}",
    "key": EVIL,
    "state": "failed",
    "queue": EVIL,
    "trigger": "invoke",
    "attempt": 1,
    "run_at": "2026-01-01T00:00:00+00:00",
    "finished_at": None,
    "payload": {"name": EVIL},
    "error": {"message": EVIL, "traceback": f"Traceback:\n\tValueError: {EVIL}"},
}
LANE: dict[str, Any] = {"task": "t", "key": EVIL, "halted_at": None}


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().out
    assert "gotcha" in text
    return text


def test_no_text_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_job(JOB)
    text = shown(capsys)
    output.print_jobs([JOB])
    text += shown(capsys)
    output.print_lanes([LANE])
    text += shown(capsys)
    output.print_json(JOB)
    text += shown(capsys)
    assert {c for c in text if not c.isprintable()} <= {"\n", "\t"}
