"""Local PostgreSQL servers for tests, the demo and benchmarks.

Finds or unpacks server binaries, runs them in a private temporary folder and removes everything
at the end, also when this process is killed. Installs nothing, needs no root, and never touches
a server that it did not start.

Example:
    with PostgresServer(find_binaries()) as server:
        psycopg.connect(server.dsn())
"""

from tools.localpg.binaries import Binaries, BinariesNotFound, find_binaries
from tools.localpg.debian import find_wal2json_binaries
from tools.localpg.server import PostgresServer, ServerFailed

__all__ = [
    "Binaries",
    "BinariesNotFound",
    "PostgresServer",
    "ServerFailed",
    "find_binaries",
    "find_wal2json_binaries",
]
