"""Settling: which outcomes go with an exchange, and what to do about those that did not go through.

An outcome that comes back as not written is either another worker's by now (its fence was lost,
which is counted) or its row was locked for a moment (it is sent again). After a lost connection
outcomes are sent again, and the jobs of a claim whose reply was lost are given back: what the
database believes this worker to run is compared with what it does run (an audit).
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Final

import psycopg

from conductor.store.jobs import Rescheduled
from conductor.store.sessions import is_transient
from conductor.worker.outcomes import refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conductor.store.jobs import Exchange, JobStore, Outcome
    from conductor.worker.instruments import Instruments
    from conductor.worker.slots import Slots

MAX_SETTLE: Final = 1000
_AUDITS_AFTER_S: Final = (0.0, 5.0, 30.0)  # an old server process may commit a claim rather late

_LOG: Final = logging.getLogger("conductor.worker")


class Settling:
    """The outcomes of one worker on their way into the database."""

    def __init__(self, slots: Slots, instruments: Instruments) -> None:
        self._slots, self._instruments = slots, instruments
        self._limit = MAX_SETTLE
        self._sent_before: set[int] = set()
        self._audits_s: list[float] = []

    @property
    def waiting(self) -> bool:
        """Whether there is something to settle."""
        return bool(self._slots.outcomes)

    def take(self) -> list[Outcome]:
        """Return the outcomes that go next."""
        return self._slots.next_outcomes(self._limit)

    def lost(self, outcomes: Sequence[Outcome]) -> None:
        """Take note that nobody knows what became of an exchange."""
        self._slots.outcomes.extendleft(reversed(outcomes))
        self._sent_before.update(outcome.id for outcome in outcomes)
        now = monotonic()
        self._audits_s = [now + after_s for after_s in _AUDITS_AFTER_S]

    def start_over(self) -> None:
        """Forget what concerned a lease that is gone."""
        self._sent_before.clear()
        self._audits_s.clear()

    def audit_is_due(self) -> bool:
        """Return whether to compare what runs here with what the database believes."""
        return bool(self._audits_s) and monotonic() >= self._audits_s[0]

    async def audit(self, store: JobStore, worker: int) -> None:
        """Give back jobs that this worker holds without knowing. Not during an exchange."""
        held = await store.held(worker)
        del self._audits_s[:1]
        known = self._slots.known()
        for job, fence in held.items():
            if job not in known:
                _LOG.warning("giving back job %s: the reply to its claim was lost", job)
                self._slots.outcomes.append(Rescheduled(job, fence, ""))

    async def settle(
        self, store: JobStore, worker: int, outcomes: Sequence[Outcome], reply: Exchange
    ) -> None:
        """Take note of what an exchange has settled, and see to the rest."""
        if not outcomes:
            return
        settled = reply.settled
        if len(settled) == len(outcomes):
            self._instruments.count_outcomes(outcomes)
            self._limit = min(self._limit * 2, MAX_SETTLE)
        else:
            self._instruments.count_outcomes([o for o in outcomes if o.id in settled])
            again = self._refused(reply)
            known = settled.union(outcome.id for outcome in reply.refused)
            again += await self._owned(store, worker, [o for o in outcomes if o.id not in known])
            self._slots.outcomes.extend(again)
        if self._sent_before:
            self._sent_before.difference_update([outcome.id for outcome in outcomes])

    async def _owned(
        self, store: JobStore, worker: int, missing: Sequence[Outcome]
    ) -> list[Outcome]:
        """Return those that can be settled after all; count the others as fenced."""
        if not missing:
            return []
        fences = await store.owned(worker, [outcome.id for outcome in missing])
        gone = [outcome for outcome in missing if fences.get(outcome.id) != outcome.fence]
        for outcome in gone:
            if outcome.id not in self._sent_before:  # else it was settled, and the reply was lost
                self._instruments.fenced.inc()
                _LOG.warning("job %s was no longer this worker's to settle", outcome.id)
        return [outcome for outcome in missing if fences.get(outcome.id) == outcome.fence]

    def _refused(self, reply: Exchange) -> list[Outcome]:
        """Return what to send instead of outcomes that an error has kept out.

        Smaller batches find the one that is to blame; it is replaced by the error.
        """
        if not reply.refused:
            return []
        if reply.error is None or _may_pass(reply.error):
            return reply.refused
        self._limit = max(len(reply.refused) // 2, 1)
        if len(reply.refused) > 1:
            return reply.refused
        return [refused(reply.refused[0], str(reply.error))]


def _may_pass(error: psycopg.Error) -> bool:
    """Return whether an error is the server's state rather than what it was sent: sent again."""
    if isinstance(error, psycopg.errors.CheckViolation):
        # No name: the bounds of the default partition, from which a day was taken meanwhile
        # (ExecPartitionCheckEmitError in PostgreSQL's execMain.c).
        return error.diag.constraint_name is None
    # Class 42, privileges and schema, is mended by a hand, and never the fault of one outcome.
    return is_transient(error) or (error.sqlstate or "").startswith("42")
