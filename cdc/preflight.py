"""What must hold on the source server before anything is streamed from it.

Pure: facts from `catalog` in, the first thing that stands against it out. `session` refuses to
start because of it, `check` prints it.
"""

from cdc.catalog import MINIMUM_VERSION, Server
from cdc.errors import CdcError, ConfigError, PrivilegeMissing, WalLevelTooLow

_DECODING_FIXES = {15: 13, 16: 9, 17: 5}
"""First minor releases whose decoding tells transactions in progress of a changed publication."""


def refuse_server(server: Server) -> CdcError | None:
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
    return None


def warn_of_release(server: Server) -> str | None:
    """Return what is known against the minor release; None when nothing is."""
    major, minor = divmod(server.version_number, 10000)
    if minor < _DECODING_FIXES.get(major, 0):
        return (
            f"PostgreSQL {server.version} can lose rows of transactions that are open while the "
            f"publication is changed; {major}.{_DECODING_FIXES[major]} does not"
        )
    return None
