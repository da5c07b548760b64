"""Emitting events: the part of `Conductor` that knows both ways, the queue and the WAL.

Payloads are checked here; how they are written is `conductor.enqueue`'s. This module must not
decide who gets an event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

from typing_extensions import TypeVar

from conductor.arguments import check_type
from conductor.binding import refuse_second
from conductor.definitions import EventDefinition
from conductor.enqueue import Enqueued, JobBatch, Via, WalEmission, emission, emit_through_wal
from conductor.errors import UnknownEvent

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from conductor.connections import Connections

P = TypeVar("P")


class Emitter(ABC):
    """What emits the events of an application."""

    events: dict[str, EventDefinition[Any]]
    _connections: Connections

    @abstractmethod
    async def enqueue_batch(
        self, batch: JobBatch, connection: AsyncConnection[Any] | None = None, *, hint: bool = False
    ) -> list[Enqueued]:
        """Enqueue a batch on the caller's connection, or commit it on one of the client's own."""

    @overload
    async def emit(
        self,
        event: EventDefinition[P],
        payload: P,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        via: Via = ...,
    ) -> None: ...
    @overload
    async def emit(
        self,
        event: EventDefinition[None],
        payload: None = ...,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        via: Via = ...,
    ) -> None: ...
    @overload
    async def emit(
        self,
        event: str,
        payload: Any = ...,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        via: Via = ...,
    ) -> None: ...
    async def emit(
        self,
        event: EventDefinition[Any] | str,
        payload: Any = None,
        *,
        metadata: dict[str, Any] | None = None,
        connection: AsyncConnection[Any] | None = None,
        hint: bool = False,
        via: Via = "queue",
    ) -> None:
        """Emit an event: every task subscribed to it gets a job, once this is committed.

        ``connection`` and ``hint`` as for `invoke`. ``via="wal"`` writes a message into the WAL in
        place of a job: no row, and a sidecar routes it in commit order. The connection must be to
        the source database of one; what is emitted so is lost in a gap of its slot. ``"auto"``
        does that where it can be, and else writes a job. Raises UnknownEvent, PayloadInvalid,
        DatabaseUnavailable, EmitRefused.

            await conductor.emit(user_created, UserCreated(id=1), connection=conn)
        """
        await self._emit(event, [payload], metadata, connection, hint=hint, via=via)

    async def emit_many(
        self,
        event: EventDefinition[P],
        payloads: Iterable[P],
        *,
        metadata: dict[str, Any] | None = None,
        connection: AsyncConnection[Any] | None = None,
        hint: bool = False,
        via: Via = "queue",
    ) -> None:
        """Emit an event many times, in order, in one statement."""
        await self._emit(event, payloads, metadata, connection, hint=hint, via=via)

    async def _emit(
        self,
        event: EventDefinition[Any] | str,
        payloads: Iterable[Any],
        metadata: dict[str, Any] | None,
        connection: AsyncConnection[Any] | None,
        *,
        hint: bool,
        via: Via,
    ) -> None:
        if via == "queue":
            batch = self.emission(event, payloads, metadata)
            if batch.payloads:
                await self.enqueue_batch(batch, connection, hint=hint)
            return
        emission = self.wal_emission(event, payloads, metadata, via)
        if emission.payloads:
            await self.emit_on(emission, connection)

    async def emit_on(
        self, emission: WalEmission, connection: AsyncConnection[Any] | None = None
    ) -> None:
        """Emit through the WAL on the caller's connection, or one to the queue database."""
        if connection is not None:
            await emit_through_wal(connection, emission)
            return
        async with self._connections.lend() as own:
            await emit_through_wal(own, emission)

    def emission(
        self,
        event: EventDefinition[Any] | str,
        payloads: Iterable[Any],
        metadata: dict[str, Any] | None,
    ) -> JobBatch:
        """Return the checked batch that `emit` and `emit_many` enqueue."""
        definition = self._known_event(event)
        encoded = [definition.encode_payload(payload) for payload in payloads]
        return emission(definition.name, encoded, metadata)

    def wal_emission(
        self,
        event: EventDefinition[Any] | str,
        payloads: Iterable[Any],
        metadata: dict[str, Any] | None,
        via: Via,
    ) -> WalEmission:
        """Return what `emit` and `emit_many` emit by way of the WAL, checked."""
        definition = self._known_event(event)
        encoded = [definition.encode_payload(payload) for payload in payloads]
        return WalEmission(definition.name, encoded, via, metadata)

    def _known_event(self, event: EventDefinition[Any] | str) -> EventDefinition[Any]:
        check_type("the event", event, (EventDefinition, str), "emit(user_created, …)")
        name = event if isinstance(event, str) else event.name
        definition = self.events.get(name)
        if definition is None:
            raise UnknownEvent(name, self.events)
        if not isinstance(event, str):
            refuse_second(definition, event, "event")
        return definition
