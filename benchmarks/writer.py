"""What capture costs the writer, and how soon a commit reaches its handler.

The writer is pgbench: updates and inserts of captured tables by four clients. With capture, the
sidecar follows in real time; without, it is stopped (its slot stays, as after a crash), and catches
up before the next run. All share the machine, so at full speed the sidecar also takes CPU from the
writer: the slowdown at a fixed rate is what remains when there is CPU left.
"""

import re
from pathlib import Path
from statistics import median

from benchmarks.report import Result, rate
from benchmarks.stand import Stand

WRITES = Path(__file__).parent / "writes.pgbench"
INSERTS = Path(__file__).parent / "inserts.pgbench"
RATE_PER_S = 1_000
WRITES_PER_S = 400
TPS = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)
LATENCY = re.compile(r"^latency average = ([\d.]+) ms", re.MULTILINE)


async def measure_slowdown(stand: Stand, runs: int, seconds: int) -> list[Result]:
    """Measure it at full speed and at a fixed rate."""
    tps: dict[bool, list[float]] = {True: [], False: []}
    latency_ms: dict[bool, list[float]] = {True: [], False: []}
    async with stand.worker("routing"), stand.sidecar():
        await stand.wait_for("is_captured")
    for _ in range(runs):
        for captured in (True, False):
            full, fixed = await write(stand, seconds, captured=captured)
            tps[captured].append(full)
            latency_ms[captured].append(fixed)
    slowdown = 1 - median(tps[True]) / median(tps[False])
    added = median(latency_ms[True]) / median(latency_ms[False]) - 1
    return [
        Result(
            "writer slowdown by capture, full speed",
            f"{rate(tps[True], 'tps')}; without {rate(tps[False], 'tps')}",
            100 * slowdown,
            "%",
            "≤ 5 %",
        ),
        Result(
            f"latency of a write at {WRITES_PER_S:,} tps, with capture against without",
            f"{median(latency_ms[True]):.2f} ms; without {median(latency_ms[False]):.2f} ms",
            100 * added,
            "%",
        ),
    ]


async def write(stand: Stand, seconds: int, *, captured: bool) -> tuple[float, float]:
    """Write at full speed, then at the fixed rate; return (tps, milliseconds)."""
    if captured:
        async with stand.sidecar():
            await catch_up(stand)
            return await write_both(stand, seconds)
    return await write_both(stand, seconds)


async def write_both(stand: Stand, seconds: int) -> tuple[float, float]:
    """Run pgbench twice."""
    full = await pgbench(stand, WRITES, seconds)
    fixed = await pgbench(stand, WRITES, seconds, "--rate", str(WRITES_PER_S))
    return find(TPS, full), find(LATENCY, fixed)


async def catch_up(stand: Stand) -> None:
    """Wait until the sidecar has routed everything, and empty the queue."""
    lsn = await stand.run("read_lsn")
    await stand.run("fill", transactions=1, rows_each=1)
    await stand.wait_for("is_routed", slot=stand.slot, lsn=lsn)
    await stand.run("empty_queue")


async def measure_latency(stand: Stand, seconds: int) -> list[Result]:
    """Insert at a fixed rate; handlers tell how long ago their change was committed."""
    async with stand.worker("latency"), stand.sidecar():
        await stand.wait_for("is_captured")
        await catch_up(stand)
        await pgbench(stand, INSERTS, seconds, "--rate", str(RATE_PER_S))
        await stand.wait_for("is_idle")
    p50_s, p99_s, count = await stand.row("read_latencies") or (0.0, 0.0, 0)
    numbers = f"{count:,} changes, p50 {1000 * p50_s:.1f} ms, p99 {1000 * p99_s:.1f} ms"
    name = f"commit → handler started at {RATE_PER_S:,} changes/s"
    return [
        Result(f"{name}, p50", numbers, 1000 * p50_s, "ms", "≤ 5 ms"),
        Result(f"{name}, p99", numbers, 1000 * p99_s, "ms", "≤ 25 ms"),
    ]


async def pgbench(stand: Stand, script: Path, seconds: int, *options: str) -> str:
    """Run pgbench with four clients; return what it prints."""
    return await stand.program(
        "pgbench",
        *("--no-vacuum", "--client", "4", "--jobs", "1", "--time", str(seconds)),
        *("--file", str(script), *options, stand.dsn),
    )


def find(pattern: re.Pattern[str], text: str) -> float:
    """The number that pgbench printed.

    Raises:
        LookupError: there is none.
    """
    match = pattern.search(text)
    if match is None:
        raise LookupError(f"no {pattern.pattern!r} in {text!r}")
    return float(match[1])
