"""Every way `cdc` can fail, in one tree.

An error's message holds the facts; its `hint` says what an operator does about them; `retry` says
whether trying again can help; `exit_code` is what the process ends with (sysexits numbers: 65
stream refused, 69 database unavailable, 70 bug, 78 configuration). `condition` names the errors
that may mean loss: it is the name in `conductor.gaps`, the metric's label and the log's field.

Nothing here imports anything of the project but `lsn`.
"""

# ruff: noqa: N818 — an operator reads SlotLost and FenceLost; "Error" adds nothing to a condition

import enum
from collections.abc import Sequence
from typing import ClassVar, Final

from cdc.lsn import Lsn

_GAP_POLICY: Final = (
    "CDC_GAP_POLICY=stop (default) ends with status 65 until somebody has decided; "
    "CDC_GAP_POLICY=recreate drops the slot and goes on with a new one: what was committed between "
    "the progress and its start gives no jobs, and a closed row of conductor.gaps says from where "
    "to where"
)


class Retry(enum.Enum):
    """Whether the same attempt can succeed later."""

    TIMED = "timed"  # by itself: try again after a pause
    MANUAL = "manual"  # after somebody has changed something
    NEVER = "never"


class CdcError(Exception):
    """The root. An instance may carry a more exact `hint` than its class.

    >>> CdcError("table shop.users has no key", hint="alter table …").hint
    'alter table …'
    """

    retry: ClassVar[Retry] = Retry.NEVER
    exit_code: ClassVar[int] = 70
    condition: ClassVar[str | None] = None
    leaves_gap: ClassVar[bool] = True  # its condition, if it is one, has a row in conductor.gaps
    hint: str = "this is a bug in cdc: please report it with the log"
    since: Lsn | None = None
    """Until where everything was well for certain, if that is before the progress."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint

    @property
    def facts(self) -> dict[str, str]:
        """What the row of its gap holds besides message and hint."""
        return {}


class ConfigError(CdcError):
    """A setting is missing or wrong."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = "correct the setting: command line, environment, TOML file or secret file"


# --- the databases are not there, or not as we need them -------------------------------------


class SourceUnavailable(CdcError):
    """The source database cannot be reached, or the connection to it was lost."""

    retry = Retry.TIMED
    exit_code = 69
    hint = "check CDC_SOURCE_DSN and that the source database accepts connections"


class QueueUnavailable(CdcError):
    """The queue database cannot be reached, or the connection to it was lost."""

    retry = Retry.TIMED
    exit_code = 69
    hint = "check CDC_QUEUE_DSN and that the queue database accepts connections"


class PrivilegeMissing(CdcError):
    """The role may not do what replication needs."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = (
        "grant the role what it lacks, like `alter role … replication` (deploy/postgres/roles.sh)"
    )


class WalLevelTooLow(CdcError):
    """The server does not write what logical decoding needs."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = "set wal_level = logical on the source server and restart it"


class WalUnlimited(CdcError):
    """Nothing limits the WAL that the server keeps for a slot: it could fill the disk."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = (
        "alter system set max_slot_wal_keep_size = '20GB' (what the disk can spare), then select "
        "pg_reload_conf(); where the server has no such setting: CDC_ALLOW_UNLIMITED_WAL=true"
    )


class PluginRefused(CdcError):
    """The server does not have the output plugin, or does not let it be used."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = (
        "install the plugin on the source server and name it in output_plugin_libraries, where the "
        "server has that setting (alter system set …; select pg_reload_conf()); or set "
        "CDC_PLUGIN=pgoutput"
    )


class SpoolFailed(CdcError):
    """Transactions in progress cannot be kept on this process' disk."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = (
        "give the sidecar a temporary folder (TMPDIR) with room for the largest transactions that "
        "run at once, or set CDC_STREAMING=off: the server then keeps them"
    )


# --- bytes that are not what they should be --------------------------------------------------


class ProtocolError(CdcError):
    """The server sent bytes that are not the protocol: the stream cannot go on.

    `tag` is the message's first byte as text, `offset` counts from the start of that message.
    """

    retry = Retry.MANUAL
    exit_code = 65
    condition = "protocol_error"
    hint = "check the versions of server and cdc, and what stands between them"

    def __init__(self, tag: str, offset: int, expected: str, actual: str) -> None:
        super().__init__(f"message {tag!r}, byte {offset}: expected {expected}, got {actual}")
        self.tag = tag
        self.offset = offset
        self.expected = expected
        self.actual = actual


class RelationUnknown(ProtocolError):
    """A row came for a relation that was never described."""

    condition = "relation_unknown"

    def __init__(self, relation_oid: int) -> None:
        super().__init__("R", 0, f"a Relation message for OID {relation_oid}", "none so far")
        self.relation_oid = relation_oid


class ServerDecodeError(CdcError):
    """The server itself fails to decode the WAL, again and again at one position."""

    retry = Retry.MANUAL
    exit_code = 65
    condition = "server_decode_error"
    hint = (
        "if client_encoding = SQL_ASCII does not help, give that transaction up: `cdc slot skip` "
        "with the position that the error names; no gap policy applies"
    )


class ValueUndecodable(CdcError):
    """A column's value is not UTF-8. A dead letter: the stream goes on."""

    exit_code = 65
    hint = (
        "correct the row in the source database, which is a change of its own and gives a job; "
        "the letter can then go: `cdc dead discard`"
    )


class UndecodableMessage(CdcError):
    """The body of a row or message cannot be decoded. A dead letter: the stream goes on.

    `relation_oid` is None when not even that could be read, for Truncate and for logical messages.
    For a message that is not transactional `commit_lsn` is its own LSN and `ordinal` is -1.
    """

    exit_code = 65
    hint = "look at the dead letter's bytes; the stream goes on without it"

    def __init__(
        self, cause: ProtocolError, *, relation_oid: int | None, ordinal: int, commit_lsn: int
    ) -> None:
        super().__init__(f"commit {Lsn(commit_lsn)}, ordinal {ordinal}: {cause}")
        self.relation_oid = relation_oid
        self.ordinal = ordinal
        self.commit_lsn = commit_lsn


class EmissionInvalid(CdcError):
    """A message with the prefix of emitted events is none of ours. A dead letter.

    Its author is whoever may run pg_logical_emit_message, which is everybody by default.
    """

    exit_code = 65
    hint = "emit events with conductor.emit; revoke pg_logical_emit_message (deploy/postgres)"


# --- the slot, and positions that do not fit together ----------------------------------------


class SlotError(CdcError):
    """The slot cannot continue from our progress."""

    retry = Retry.MANUAL
    exit_code = 65
    hint = f"look at `cdc status`. {_GAP_POLICY}"


class SlotMissing(SlotError):
    """There is progress, but no slot of that name."""

    condition = "slot_missing"
    hint = f"changes since the progress are gone, whatever is done. {_GAP_POLICY}"


class SlotLost(SlotError):
    """The server has removed WAL that the slot needs (wal_status lost)."""

    condition = "slot_lost"
    hint = f"raise max_slot_wal_keep_size, for the next time. {_GAP_POLICY}"


class SlotForeign(SlotError):
    """The slot is of another plugin, database, kind or option than ours."""

    condition = "slot_foreign"
    hint = "choose another CDC_SLOT, or drop the slot if nothing else uses it"


class SourceTaken(SlotError):
    """Another slot routes this source into the queue already: each change would be two jobs.

    Nothing is lost by it, so it leaves no gap.
    """

    exit_code = 78
    condition = "source_taken"
    leaves_gap = False
    hint = (
        "for another database give CDC_SOURCE a name of its own, which triggers then give as "
        "source=…; to take the other slot's place: `cdc slot drop` that one first"
    )


class SlotTwoPhase(SlotForeign):
    """The slot has two_phase on: rows of prepared transactions could be lost."""

    condition = "slot_two_phase"
    hint = "drop the slot and let cdc create it: without two_phase"


class SlotAhead(SlotError):
    """The slot was advanced past everything that we have acknowledged."""

    condition = "slot_ahead"
    hint = (
        "somebody else consumed the slot, or jobs were lost in a failover: find out who, and what "
        f"is missing from the progress to the slot's position. {_GAP_POLICY}"
    )


class SlotBusy(SlotError):
    """Another process streams from the slot: it leads, we stand by (SQLSTATE 55006)."""

    retry = Retry.TIMED
    exit_code = 69
    hint = "nothing to do if another cdc leads; otherwise end the backend that holds the slot"


class ServerBehind(SlotError):
    """The server's WAL ends before our progress."""

    condition = "server_behind"
    hint = (
        "a standby may have to replay first: start again later. A source that is an older copy "
        "(restored, or failed over) has lost transactions that have jobs, and will write others at "
        f"their positions. {_GAP_POLICY}"
    )


class SystemChanged(SlotError):
    """The source is another cluster than the one the progress belongs to."""

    condition = "system_changed"
    hint = (
        "check CDC_SOURCE_DSN; for a second source use another CDC_SLOT. If this cluster has taken "
        f"the place of the other: {_GAP_POLICY}; every subscription begins anew there"
    )


class TimelineSwitched(SlotError):
    """The source's timeline left ours below our progress."""

    condition = "timeline_switched"
    hint = (
        "a failover lost transactions that have jobs already: compare, from where the timeline was "
        f"left to the progress. {_GAP_POLICY}"
    )


class StandbySlotsWaiting(SlotError):
    """The stream waits for a standby named in synchronized_standby_slots."""

    retry = Retry.TIMED
    exit_code = 69
    condition = "standby_slots_waiting"
    hint = "bring the standby back, or take its slot out of synchronized_standby_slots"


class FenceLost(CdcError):
    """Another leader has raised the epoch, or the position is not the one we left."""

    retry = Retry.TIMED
    exit_code = 69
    hint = "nothing to do: another cdc leads, this one stands by"


class SinkError(CdcError):
    """The queue database refused a transaction of jobs and progress."""

    retry = Retry.TIMED
    exit_code = 69
    hint = "look at the queue database's log; nothing was acknowledged"


# --- what is published -----------------------------------------------------------------------


class PublicationError(CdcError):
    """The publication does not carry what the subscriptions need."""

    retry = Retry.MANUAL
    exit_code = 78
    hint = "compare with `cdc check`"


class PublicationMissing(PublicationError):
    """There is no publication of that name, or it came after the slot."""

    exit_code = 65
    condition = "publication_missing"
    hint = (
        "the slot has to be made after the publication, so a new one is needed: "
        "`cdc apply --accept-gap` makes both, and records what is lost. "
        f"{_GAP_POLICY}, and makes the publication as well"
    )


class PublicationDrift(PublicationError):
    """The publication is not as we made it, or would have made it."""

    exit_code = 65
    condition = "publication_drift"
    hint = (
        "changes since the last known-good position may be missing: `cdc apply --accept-gap` puts "
        f"it right and keeps the slot. {_GAP_POLICY}. Or deploy without the trigger, which retires "
        "the subscription"
    )


class PublicationForeign(PublicationError):
    """The publication belongs to somebody else, and lacks what is needed."""

    exit_code = 65
    condition = "publication_foreign"
    hint = "choose another CDC_PUBLICATION, or let its owner run what `cdc plan` prints"


class TableMissing(PublicationError):
    """A captured table was dropped, renamed or replaced by something that cannot be captured.

    Args:
        table: schema and name.
        tasks: whose subscriptions name it.
        why: what is there instead, if anything is.
    """

    exit_code = 65
    condition = "table_missing"

    def __init__(
        self, table: tuple[str, str], tasks: Sequence[str], why: str | None = None
    ) -> None:
        self.table = table
        name, of = ".".join(table), ", ".join(tasks)
        super().__init__(
            f"table {name}, captured for task {of}, {f'is no longer: {why}' if why else 'is gone'}",
            hint=f"create it again, or deploy task {of} without its trigger on {name}, which "
            "retires the subscription; CDC_GAP_POLICY=stop (default) waits for that, "
            "CDC_GAP_POLICY=recreate goes on with all other tables, and keeps the gap of this one "
            "open until it is captured again",
        )

    @property
    def facts(self) -> dict[str, str]:
        """What the row of its gap holds besides message and hint."""
        return {"schema": self.table[0], "table": self.table[1]}


class ReplicaIdentityMissing(PublicationError):
    """A table's updates and deletes would fail, or lack what a subscription asks for."""

    hint = "give the table a primary key or run `alter table … replica identity full`"


class RowsFiltered(PublicationError):
    """A subscription wants updates or deletes of a table whose rows are filtered by the server."""

    hint = "take the table out of CDC_ROW_FILTERS, or subscribe to its inserts alone"


class TableUnknown(PublicationError):
    """A subscription names a table that the source database does not have."""

    hint = "correct the subscription's table, or create it"


class ColumnUnknown(PublicationError):
    """A subscription names a column that its table does not have."""

    hint = "correct the subscription's columns"
