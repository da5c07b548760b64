"""Two-step durable jobs a second of one worker process.

Each job runs two steps whose results are committed one after the other; steps of jobs that run at
the same time, a thousand here, are committed together. The pace is read from the history's own
timestamps.
"""

from statistics import median

from benchmarks.report import Result, rate
from benchmarks.stand import Stand

JOBS = 50_000


async def measure(stand: Stand, runs: int, scale: float) -> list[Result]:
    """Drain a backlog by a worker process, a few times."""
    paces: list[float] = []
    for _ in range(runs):
        await stand.run("empty_queue")
        await stand.run("enqueue_two_steps", count=round(JOBS * scale))
        await stand.run("analyze_jobs")
        async with stand.worker("durable"):
            await stand.wait_for("is_idle")
        paces.append(float(await stand.run("read_pace")))
    numbers = rate(paces, "jobs/s")
    return [Result("two-step durable jobs", numbers, median(paces), "jobs/s", "≥ 15,000")]
