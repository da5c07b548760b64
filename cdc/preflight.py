"""What must hold on the source server before anything is streamed from it.

Pure: facts from `catalog` in, the first thing that stands against it out. `session` refuses to
start because of it, `check` prints it.
"""

from cdc.catalog import MINIMUM_VERSION, Server
from cdc.errors import CdcError, ConfigError, PluginRefused, PrivilegeMissing, WalLevelTooLow

_LOST_NUMBERS = "before wal2json 2.6, NaN and infinite numbers come as null"
_WAL2JSON_LIMITS = [
    "a truncate does not tell CASCADE and RESTART IDENTITY: both are false",
    "rows read after their table was altered or dropped are described as the catalog has it by now",
    "logical messages end at their first zero byte",
]

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
