"""The sidecar's memory while it routes one huge transaction.

The server sends it when it has committed. The sidecar writes its jobs while it comes and commits
them at its end, so that it must never hold more than a piece. Ten million rows take some minutes
and twenty gigabytes of a temporary folder, so that fewer are the default.
"""

import asyncio
from typing import Final

from benchmarks.report import Result
from benchmarks.stand import Stand

ROWS: Final = 1_000_000
SAMPLE_INTERVAL_S: Final = 0.2
TIMEOUT_S: Final = 1_200.0
MEGABYTE: Final = 1 << 20


async def measure(stand: Stand, rows: int) -> list[Result]:
    """Route a transaction of so many rows; watch the sidecar's resident memory."""
    async with stand.sidecar() as sidecar:
        async with stand.worker("routing"):
            await stand.wait_for("is_captured")
        before = sidecar.peak_memory_bytes
        await stand.run("fill", transactions=1, rows_each=rows)
        lsn = await stand.run("read_lsn")
        samples: list[int] = []

        async def sample() -> None:
            while True:
                samples.append(sidecar.memory_bytes)
                await asyncio.sleep(SAMPLE_INTERVAL_S)

        sampling = asyncio.create_task(sample())
        await stand.run("fill", transactions=1, rows_each=1)
        await stand.wait_for("is_routed", TIMEOUT_S, slot=stand.slot, lsn=lsn)
        sampling.cancel()
        peak = sidecar.peak_memory_bytes
    jobs = await stand.run("count_jobs")
    if jobs < rows or sidecar.restarts:
        raise RuntimeError(f"{jobs} jobs of {rows} rows, {sidecar.restarts} restarts")
    third = max(len(samples) // 3, 1)
    first, last = max(samples[:third]), max(samples[-third:])
    numbers = (
        f"{before / MEGABYTE:.0f} MB before; at most {first / MEGABYTE:.0f} MB in the first third, "
        f"{last / MEGABYTE:.0f} MB in the last"
    )
    name = f"sidecar's memory, one transaction of {rows:,} rows"
    return [Result(name, numbers, peak / MEGABYTE, "MB", "≤ 128 MB, flat")]
