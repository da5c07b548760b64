"""Testing handlers: run one with no database, build its events, move the queue's time.

    rehearsal = Rehearsal(deps=Deps(mailer))
    rehearsal.answer(charge, lambda payload: Receipt(amount=payload.amount))
    assert await rehearsal.run(checkout, Invocation(Order(id=7))) == Done(id=7)
    assert rehearsal.invoked(charge) == [Charge(order=7)]

Against a real database: `Orchestrator.drain` runs what is there, `travel` moves its time. Fixtures
for pytest are in `conductor.testing.plugin`.
"""

from __future__ import annotations

from conductor.errors import AnswerInvalid, StillWaiting, Unanswered
from conductor.testing.changes import deleted, inserted, truncated, updated
from conductor.testing.rehearsal import Rehearsal
from conductor.testing.travel import TimeTravel, travel

__all__ = [
    "AnswerInvalid",
    "Rehearsal",
    "StillWaiting",
    "TimeTravel",
    "Unanswered",
    "deleted",
    "inserted",
    "travel",
    "truncated",
    "updated",
]
