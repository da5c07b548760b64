"""Emitted events and the jobs that wait for them.

In the dispatcher's transaction word is left for the steps that an event concerns; the jobs are
woken after its commit, or soon after by any worker. This module must not decide what matches
(`conductor.matching` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conductor.matching import end_wait, event_topic, matched_values
from conductor.store.waits import Probe, Waiting, WaitStore, Wakeup


@dataclass(frozen=True, slots=True)
class Message:
    """An emitted event: its payload, the transaction that emitted it, and the text of it all."""

    event: str
    payload: Any
    emitted_by: str
    envelope: str


async def leave_word(store: WaitStore, messages: Sequence[Message]) -> list[int]:
    """Leave word for what waits for these events; return the jobs."""
    topics = {event_topic(message.event) for message in messages}
    known = await store.wait_fields(topics) if topics else []
    if not known:
        return []
    waiting = await store.waiting_for(probes(messages, known))
    wakeups = [word for found in waiting if (word := judge(found, messages[found.place]))]
    if wakeups:
        await store.add_wakeups(wakeups)
    return sorted({wakeup.job for wakeup in wakeups})


def probes(messages: Sequence[Message], known: Sequence[tuple[str, str]]) -> list[Probe]:
    """Return each message by each of the fields that jobs wait by."""
    by_topic: dict[str, list[str]] = {}
    for topic, fields in known:
        by_topic.setdefault(topic, []).append(fields)
    found: list[Probe] = []
    for place, message in enumerate(messages):
        topic = event_topic(message.event)
        for fields in by_topic.get(topic, ()):
            matched = matched_values(fields, message.payload)
            if matched is not None:
                found.append(Probe(topic, fields, matched, message.emitted_by, place))
    return found


def judge(waiting: Waiting, message: Message) -> Wakeup | None:
    """Return the word for a step whose fields match; None when its filter says no."""
    ending = end_wait(waiting.condition, message.payload, message.envelope)
    return None if ending is None else Wakeup(waiting.job, waiting.name, *ending)
