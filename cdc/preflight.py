"""What must hold on the source server before anything is streamed from it.

Pure: facts from `catalog` in, the first thing that stands against it out. `session` refuses to
start because of it, `check` prints it.
"""

from cdc.catalog import MINIMUM_VERSION, Server
from cdc.errors import (
    CdcError,
    ConfigError,
    PluginRefused,
    PrivilegeMissing,
    WalLevelTooLow,
    WalUnlimited,
)
from cdc.narrowing import WHOLE_TABLES, Narrowing

_FAILOVER_SLOTS = 170000
_STREAMING_PARALLEL = 160000
_LOST_NUMBERS = "before wal2json 2.6, NaN and infinite numbers come as null"
_WAL2JSON_LIMITS = [
    "a truncate does not tell CASCADE and RESTART IDENTITY: both are false",
    "rows read after their table was altered or dropped are described as the catalog has it by now",
    "logical messages end at their first zero byte",
]

_STANDBY_BEHIND = (
    "the slot fails over, but synchronized_standby_slots is empty: a standby may lack what was "
    "routed already (server_behind)"
)
_JOBS_LOST = (
    "source and queue fail over together, and jobs are not committed synchronously: those of the "
    "last moments can be lost though the slot has moved on (slot_ahead)"
)

_DECODING_FIXES = {15: 13, 16: 9, 17: 5}
"""First minor releases whose decoding tells transactions in progress of a changed publication."""


def refuse_server(server: Server, plugin: str) -> CdcError | None:
    """Return why this server, with our role, cannot be a source; None when it can."""
    if server.version_number < MINIMUM_VERSION:
        return ConfigError(
            f"the source is PostgreSQL {server.version}; cdc needs {MINIMUM_VERSION // 10000}",
            hint="upgrade the source server",
        )
    if server.wal_level != "logical":
        return WalLevelTooLow(f"the source server has wal_level = {server.wal_level}")
    if not server.can_replicate:
        return PrivilegeMissing(
            f"role {server.role!r} may not replicate",
            hint=f'alter role "{server.role}" replication',
        )
    if not _may_use(server, plugin):
        return PluginRefused(
            f"the source server does not let {plugin} be used: "
            f"output_plugin_libraries = {server.output_plugin_libraries}"
        )
    return None


def refuse_streaming(server: Server, plugin: str, streaming: str) -> CdcError | None:
    """Return why transactions in progress cannot be streamed so; None when they can."""
    if streaming == "off":
        return None
    if plugin != "pgoutput":
        return ConfigError(
            f"CDC_STREAMING={streaming} is for pgoutput, and CDC_PLUGIN is {plugin}",
            hint="unset one of them",
        )
    if streaming == "parallel" and server.version_number < _STREAMING_PARALLEL:
        return ConfigError(
            f"CDC_STREAMING=parallel needs PostgreSQL 16; the source is {server.version}",
            hint="CDC_STREAMING=on",
        )
    return None


def refuse_narrowing(plugin: str, narrowing: Narrowing) -> CdcError | None:
    """Return why nothing can be left out of tables; None when nothing is, or it can be."""
    if plugin == "pgoutput" or narrowing == WHOLE_TABLES:
        return None
    return ConfigError(
        f"CDC_COLUMN_LISTS and CDC_ROW_FILTERS are for pgoutput: {plugin} reads no publication",
        hint="unset them, or choose the plugin pgoutput",
    )


def refuse_unlimited_wal(server: Server, *, allowed: bool) -> CdcError | None:
    """Return why no slot of ours should be kept on this server; None when one may be."""
    if server.max_slot_wal_keep_bytes >= 0 or allowed:
        return None
    return WalUnlimited(
        "max_slot_wal_keep_size is unlimited on the source server: a slot that nobody reads fills "
        "its disk"
    )


def can_fail_over(server: Server) -> bool:
    """Tell whether this server can have a slot that survives a failover."""
    return server.version_number >= _FAILOVER_SLOTS and not server.in_recovery


def warn_of_failover(server: Server, *, same_queue: bool) -> list[tuple[str, str]]:
    """Return what a failover would cost a failover slot, each with its fix; none without standbys.

    Args:
        server: the source.
        same_queue: the queue database is in the same cluster, so it fails over as well.
    """
    if not server.physical_slots:
        return []
    warnings = []
    if not server.synchronized_standby_slots:
        warnings.append((_STANDBY_BEHIND, "name the standby's physical slot there"))
    if same_queue and not server.synchronous_standby_names:
        fix = "name the standby in synchronous_standby_names, or keep the queue elsewhere"
        warnings.append((_JOBS_LOST, fix))
    return warnings


def limits_of(plugin: str, *, numbers_as_text: bool = False) -> list[str]:
    """Return what this plugin cannot tell and pgoutput does, one sentence a limit.

    Args:
        plugin: the output plugin.
        numbers_as_text: it was asked for numbers as text, and agreed.
    """
    if plugin != "wal2json":
        return []
    return _WAL2JSON_LIMITS if numbers_as_text else [_LOST_NUMBERS, *_WAL2JSON_LIMITS]


def _may_use(server: Server, plugin: str) -> bool:
    if server.output_plugin_libraries is None:
        return True
    allowed = {name.strip().strip('"') for name in server.output_plugin_libraries.split(",")}
    return plugin in allowed


def warn_of_release(server: Server) -> str | None:
    """Return what is known against the minor release; None when nothing is."""
    major, minor = divmod(server.version_number, 10000)
    if minor < _DECODING_FIXES.get(major, 0):
        return (
            f"PostgreSQL {server.version} can lose rows of transactions that are open while the "
            f"publication is changed; {major}.{_DECODING_FIXES[major]} does not"
        )
    return None
