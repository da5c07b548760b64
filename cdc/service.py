"""The process: attempts to lead, one after the other, until it is told to stop or must not go on.

Decides what each error means: try again after a pause that grows, accept a loss under the policy
`recreate`, or end with the error (and so with its exit code). Serves metrics and probes meanwhile.
Readiness is not leadership: a standby is ready. Liveness asks no database.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from cdc.config import Settings
from cdc.connection import describe_dsn
from cdc.errors import (
    CdcError,
    ConfigError,
    FenceLost,
    QueueUnavailable,
    Retry,
    ServerDecodeError,
    SinkError,
    SlotBusy,
    SourceUnavailable,
)
from cdc.metrics import Metrics
from cdc.session import Session
from cdc.slots import RECREATABLE, Loss
from conductor.gauges import SidecarGauges
from conductor.health import HealthServer

PAUSE_MIN_S: Final = 0.2
PAUSE_MAX_S: Final = 3.0
DECODE_ATTEMPTS: Final = 3
_STEADY_S: Final = 5.0
_STUCK_FACTOR: Final = 2
_GAUGES_STOP_S: Final = 1.0
_CAUSES: Final[dict[type[CdcError], str]] = {
    SourceUnavailable: "source",
    QueueUnavailable: "queue",
    SinkError: "queue",
    FenceLost: "fence",
    SlotBusy: "slot",
}


class Service:
    """One sidecar. `run` ends after `stop`, or raises the `CdcError` that it must not survive.

    Example:
        service = Service(settings, Metrics(version, settings.slot))
        loop.add_signal_handler(signal.SIGTERM, service.stop)
        await service.run()
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._log: Any = structlog.get_logger("cdc").bind(slot=settings.slot)
        self._stopping = asyncio.Event()
        self._session: Session | None = None
        self._pauses = 0
        self._decode_failures = 0
        self._good_s = time.monotonic()
        self._last_error: CdcError | None = None
        self._gauges = SidecarGauges(settings.queue_conninfo)
        self.health = HealthServer(
            metrics.registry,
            self._gauges.registry,
            live=self.why_dead,
            ready=self.why_not_ready,
        )

    def stop(self) -> None:
        """Finish the batch in hand, acknowledge it, and end."""
        self._stopping.set()

    def why_dead(self) -> str | None:
        """Say why the process should be restarted; None while it can still work."""
        session = self._session
        limit_s = _STUCK_FACTOR * self._settings.wal_sender_timeout_s
        if session is not None and session.silence_s > limit_s:
            return f"the stream has been stuck for {session.silence_s:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        """Say why there is no connection; None while leading or standing by."""
        session = self._session
        if session is not None and session.state != "connecting":
            return None
        # No message of the driver here: it names hosts and roles.
        error = self._last_error
        return f"not connected ({type(error).__name__})" if error else "not connected yet"

    async def run(self) -> None:
        """Lead or stand by until `stop`.

        Raises:
            CdcError: trying again does not help, or did not for `give_up_after_s`.
        """
        await self._serve()
        self._log.info(
            "starting",
            source=describe_dsn(self._settings.source_conninfo),
            queue=describe_dsn(self._settings.queue_conninfo),
            publication=self._settings.publication,
        )
        try:
            async with self._exporting():
                await self._lead_or_stand_by()
            self._log.info("stopped")
        finally:
            await self.health.stop()

    async def _lead_or_stand_by(self) -> None:
        loss: Loss | None = None
        while not self._stopping.is_set():
            session = self._session = Session(
                self._settings, self._metrics, loss=loss, is_final=self._is_final
            )
            loss = None
            try:
                await self._attempt(session)
            except CdcError as error:
                loss = self._judge(error, session)
                await self._pause(error)

    @asynccontextmanager
    async def _exporting(self) -> AsyncIterator[None]:
        """Offer the gauges of the queue as well, where anything is served."""
        if self._settings.metrics_port < 0:
            yield
            return
        gauges = asyncio.create_task(self._gauges.run(), name="gauges")
        try:
            yield
        finally:
            self._gauges.stop()
            await asyncio.wait((gauges,), timeout=_GAUGES_STOP_S)
            gauges.cancel()
            await asyncio.gather(gauges, return_exceptions=True)

    async def _serve(self) -> None:
        settings = self._settings
        if settings.metrics_port < 0:
            return
        try:
            await self.health.start(settings.metrics_host, settings.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.metrics_host}:{settings.metrics_port}: "
                f"{error.strerror or error}",
                hint="choose another CDC_METRICS_PORT (0: any free one, -1: none)",
            ) from error
        self._log.info("serving", host=settings.metrics_host, port=self.health.port)

    async def _attempt(self, session: Session) -> None:
        """Run one session; on `stop` let it finish, but not for longer than the time for it."""
        run = asyncio.create_task(session.run(), name="session")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait((run, stop), return_when=asyncio.FIRST_COMPLETED)
            if not run.done() and session.stop():
                await asyncio.wait((run,), timeout=self._settings.stop_timeout_s)
            if not run.done():
                run.cancel()
            await asyncio.wait((run,))
            if not run.cancelled():
                run.result()
        finally:
            stop.cancel()
            run.cancel()
            await asyncio.gather(stop, run, return_exceptions=True)

    def _is_final(self, error: CdcError) -> bool:
        """Tell whether trying again is over. The server may fail to decode for a passing reason."""
        patient = isinstance(error, ServerDecodeError)
        return not patient or self._decode_failures >= DECODE_ATTEMPTS - 1

    def _judge(self, error: CdcError, session: Session) -> Loss | None:
        """Decide on an error: return the loss to accept, if any; raise what ends the process."""
        now_s = time.monotonic()
        if session.connected_s is not None:
            self._good_s = now_s
            if now_s - session.connected_s > _STEADY_S:
                self._pauses = self._decode_failures = 0
        self._last_error = error
        if self._stopping.is_set():
            return None
        if not self._is_final(error):
            self._decode_failures += 1
            return None
        loss = session.loss
        if isinstance(error, RECREATABLE):
            if self._settings.gap_policy == "recreate" and loss is not None:
                return loss
            raise error
        if error.retry is not Retry.TIMED:
            raise error
        patient = isinstance(error, SlotBusy | FenceLost)
        if not patient and now_s - self._good_s > self._settings.give_up_after_s:
            raise error
        return None

    async def _pause(self, error: CdcError) -> None:
        """Wait before the next attempt: longer each time, never in step with other sidecars."""
        cause = next((c for kind, c in _CAUSES.items() if isinstance(error, kind)), "other")
        self._metrics.reconnecting(cause)
        pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2**self._pauses) * random.uniform(0.5, 1)  # noqa: S311  # jitter
        self._pauses = min(self._pauses + 1, 10)
        self._log.warning(
            "session_ended",
            cause=cause,
            error=str(error),
            hint=error.hint,
            retry_in_s=round(pause_s, 2),
        )
        try:
            await asyncio.wait_for(self._stopping.wait(), pause_s)
        except TimeoutError:
            return
