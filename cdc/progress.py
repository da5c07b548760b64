"""What may be acknowledged to the slot, and when an idle position is worth storing.

The rule (router-rules 1 and 6): acknowledge what is durable in the queue database, never more.
While something received is not durable yet, that is the last durable commit. When nothing is
outstanding, a keepalive says that everything below its `wal_end` has been sent, so the position
may move there: after that has itself been stored as `acknowledged_lsn`, at most every 30 s or
16 MB, because storing it in the source database makes WAL of its own.

All positions are commit *end* LSNs or keepalive positions; the clock is the caller's.
"""

from typing import Final

from cdc.lsn import Lsn

IDLE_INTERVAL_S: Final = 30.0
IDLE_DISTANCE_BYTES: Final = 16 * 1024 * 1024


class Progress:
    """The positions of one session with the source. Make a new one for each session.

    `routed_lsn` and `acknowledged_lsn` are those of the progress row *after* a synchronous commit
    has touched it (raising the epoch does), so both are durable.

    >>> progress = Progress(routed_lsn=100, acknowledged_lsn=100)
    >>> progress.transaction_started()
    >>> progress.transaction_ended(200)
    >>> progress.committed(200, durable=False)
    >>> progress.acknowledgeable()
    100
    >>> progress.committed(200, durable=True)
    >>> progress.acknowledgeable()
    200
    """

    __slots__ = (
        "_idle_lsn",
        "_in_transaction",
        "_stored_at_s",
        "_stored_lsn",
        "durable_lsn",
        "received_lsn",
        "routed_lsn",
    )

    def __init__(self, routed_lsn: int, acknowledged_lsn: int) -> None:
        self.routed_lsn = routed_lsn
        self.durable_lsn = routed_lsn
        self._stored_lsn = max(routed_lsn, acknowledged_lsn)
        self.received_lsn = routed_lsn
        self._idle_lsn = self._stored_lsn
        self._in_transaction = False
        self._stored_at_s: float | None = None

    @property
    def outstanding(self) -> bool:
        """Whether anything received is not durable yet.

        The start of a transaction cannot be told by its LSN: its commit record may begin exactly
        where the last one ended.
        """
        return self._in_transaction or self.received_lsn > self.durable_lsn

    def transaction_started(self) -> None:
        """Note the Begin of a transaction that is not skipped."""
        self._in_transaction = True

    def transaction_ended(self, end_lsn: int) -> None:
        """Note its Commit."""
        self._in_transaction = False
        self.received(end_lsn)

    def received(self, lsn: int) -> None:
        """Note a message that stands alone, by the LSN at which it ends."""
        self.received_lsn = max(self.received_lsn, lsn)

    def committed(self, end_lsn: int, *, durable: bool) -> None:
        """Note that the sink has committed everything up to `end_lsn`, which it stored as well.

        A durable commit makes those before it on the same session durable. Raises `ValueError`
        when the position goes back or was never received.
        """
        if not self.routed_lsn <= end_lsn <= self.received_lsn:
            bounds = f"{Lsn(self.routed_lsn)} and {Lsn(self.received_lsn)}"
            raise ValueError(f"committed {Lsn(end_lsn)}, which is not between {bounds}")
        self.routed_lsn = end_lsn
        if durable:
            self.durable_lsn = end_lsn
            self._stored_lsn = max(self._stored_lsn, end_lsn)

    def keepalive(self, wal_end: int) -> None:
        """Note a keepalive. With work outstanding it means nothing: another one will come."""
        if not self.outstanding:
            self._idle_lsn = max(self._idle_lsn, wal_end)

    def idle_lsn_to_store(self, now_s: float) -> int | None:
        """Return the position to store as `acknowledged_lsn` now, or None to leave it.

        `now_s` is any clock that only goes forward. After a durable store call `idle_stored`.
        """
        distance_bytes = self._idle_lsn - self._stored_lsn
        if distance_bytes <= 0:
            return None
        stored_at_s = self._stored_at_s
        if (
            stored_at_s is None
            or distance_bytes >= IDLE_DISTANCE_BYTES
            or now_s - stored_at_s >= IDLE_INTERVAL_S
        ):
            return self._idle_lsn
        return None

    def idle_stored(self, lsn: int, now_s: float) -> None:
        """Note that `lsn` is durable as `acknowledged_lsn` in the progress row."""
        self._stored_lsn = max(self._stored_lsn, lsn)
        self._stored_at_s = now_s

    def acknowledgeable(self) -> int:
        """Return the LSN to send as flushed: everything below it may be forgotten by the server."""
        return self._stored_lsn
