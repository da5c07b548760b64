"""`python -m benchmarks`: run them, print them, store them.

make bench                                  # quick
make bench ARGS="--runs 5 --seconds 90"     # as the budgets ask for
make bench ARGS="--only router worker"
make bench ARGS="--only memory --rows 10000000 --write"   # puts its rows into the results
"""

import argparse
import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    claims,
    memory,
    metrics,
    peer,
    router,
    snapshot,
    steps,
    subscriptions,
    worker,
    writer,
)
from benchmarks.report import Result, store
from benchmarks.stand import SETTINGS, Stand
from tools.localpg import PostgresServer, find_binaries

FOLDER = Path(__file__).resolve().parents[1] / ".bench"
LOGS = FOLDER / "logs"
WRITE_SECONDS = 6


async def run(
    only: Sequence[str], runs: int, seconds: float, scale: float, rows: int
) -> tuple[list[Result], str]:
    """Run the chosen benchmarks on a server of their own; return results and its version."""
    write_seconds = max(round(WRITE_SECONDS * scale), 1)
    benchmarks: Mapping[str, Callable[[Stand], Awaitable[list[Result]]]] = {
        "router": lambda stand: router.measure(stand, runs, scale),
        "worker": lambda stand: worker.measure(stand, runs, scale),
        "steps": lambda stand: steps.measure(stand, runs, scale),
        "snapshot": lambda stand: snapshot.measure(stand, seconds),
        "writer": lambda stand: writer.measure_slowdown(stand, runs, write_seconds),
        "latency": lambda stand: writer.measure_latency(stand, write_seconds),
        "claims": lambda stand: claims.measure(stand, runs, scale),
        "memory": lambda stand: memory.measure(stand, round(rows * scale)),
        "peer": lambda stand: peer.measure(stand, runs, scale),
        "subscriptions": lambda _: subscriptions.measure(runs, scale),
        "metrics": lambda _: metrics.measure(runs, scale),
    }
    results: list[Result] = []
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    with PostgresServer(find_binaries(), settings=SETTINGS) as server:
        print(f"PostgreSQL {server.binaries.full_version}, {runs} runs each", flush=True)
        for name, benchmark in benchmarks.items():
            if name in only or not only:
                async with Stand.build(server, name, LOGS) as stand:
                    found = await benchmark(stand)
                for result in found:
                    print(f"{result.name}: {result.shown}   [{result.numbers}]", flush=True)
                results += found
        return results, server.binaries.full_version


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--runs", type=int, default=3, help="of each side of a comparison")
    parser.add_argument("--seconds", type=float, default=30, help="that a snapshot is held")
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes: 0.1 for a look")
    parser.add_argument("--rows", type=int, default=memory.ROWS, help="of the huge transaction")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument(
        "--write",
        action="store_true",
        help="also write benchmarks/RESULTS.md: all, or --only these",
    )
    options = parser.parse_args()
    results, server = asyncio.run(
        run(options.only, options.runs, options.seconds, options.scale, options.rows)
    )
    print(f"stored in {store(results, server, FOLDER, write=options.write)}")


if __name__ == "__main__":
    main()
