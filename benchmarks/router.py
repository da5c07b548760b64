"""Source change → job: a real sidecar drains a backlog, against pg_recvlogical on an equal slot.

Both start from copies of one slot that is made just before the backlog: both get the same bytes
from the same decoder, and nothing that an earlier backlog left to be read again. pg_recvlogical
writes them to /dev/null; the sidecar decodes, routes and commits one job a row with its progress.
Runs are interleaved. A run of the sidecar is timed from when its walsender is active to when its
progress has passed the last transaction.
"""

import time
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.report import Result, rate
from benchmarks.stand import Stand

BASE = "bench_base"
PEER = "bench_peer"


@dataclass(frozen=True)
class Shape:
    """A backlog."""

    name: str
    transactions: int
    rows_each: int
    budget: str

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.transactions * self.rows_each

    def scaled(self, scale: float) -> "Shape":
        """The same with fewer transactions, or with a smaller one."""
        if self.transactions == 1:
            return replace(self, rows_each=max(round(self.rows_each * scale), 1))
        return replace(self, transactions=max(round(self.transactions * scale), 2))


SHAPES = (
    Shape("10 rows a transaction", 40_000, 10, "≥ 0.65"),
    Shape("1 row a transaction", 100_000, 1, "≥ 0.60"),
    Shape("one transaction of 100,000 rows", 1, 100_000, "≥ 0.50"),
)


@dataclass(frozen=True)
class Backlog:
    """What both drain: from `start_lsn` to beyond `last_lsn`, and no further."""

    shape: Shape
    start_lsn: str
    last_lsn: str
    end_lsn: str


async def measure(stand: Stand, runs: int, scale: float) -> list[Result]:
    """Measure every shape; `scale` makes them smaller."""
    async with stand.sidecar(), stand.worker("routing"):
        await stand.wait_for("is_captured")
    return [await measure_shape(stand, shape.scaled(scale), runs) for shape in SHAPES]


async def measure_shape(stand: Stand, shape: Shape, runs: int) -> Result:
    """Drain one backlog several times by each."""
    backlog = await prepare(stand, shape)
    ours: list[float] = []
    theirs: list[float] = []
    cpu_us: list[float] = []
    for _ in range(runs):
        theirs.append(shape.rows / await drain_by_peer(stand, backlog))
        elapsed_s, cpu_s = await drain_by_sidecar(stand, backlog)
        ours.append(shape.rows / elapsed_s)
        cpu_us.append(1e6 * cpu_s / shape.rows)
    await stand.run("drop_slot", slot=BASE)
    return Result(
        f"router, {shape.name}",
        f"{rate(ours, 'rows/s')}, {median(cpu_us):.1f} µs of the sidecar's CPU a row; "
        f"pg_recvlogical {rate(theirs, 'rows/s')}",
        median(ours) / median(theirs),
        "ratio",
        shape.budget,
    )


async def prepare(stand: Stand, shape: Shape) -> Backlog:
    """Remember where the slot stands, then write the backlog; the sidecar is not running."""
    start_lsn = await stand.run("create_slot", slot=BASE)
    await stand.run("commit_asynchronously")
    if shape.transactions > 1:
        await stand.run("fill", transactions=shape.transactions - 1, rows_each=shape.rows_each)
    last_lsn = await stand.run("read_lsn")
    await stand.run("fill", transactions=1, rows_each=shape.rows_each)
    end_lsn = await stand.run("read_lsn")
    await stand.run("commit_durably")
    await stand.run("flush_wal")
    return Backlog(shape, start_lsn, last_lsn, end_lsn)


async def drain_by_peer(stand: Stand, backlog: Backlog) -> float:
    """Let pg_recvlogical read the backlog; return the seconds it took."""
    await stand.run("copy_slot", source=BASE, slot=PEER)
    started = time.monotonic()
    await stand.program(
        "pg_recvlogical",
        *("--dbname", stand.dsn, "--slot", PEER, "--start", "--file", "/dev/null", "--no-loop"),
        *("--endpos", backlog.end_lsn, "-o", "proto_version=1", "-o", "messages=true"),
        *("-o", "publication_names=conductor"),
    )
    elapsed_s = time.monotonic() - started
    await stand.run("drop_slot", slot=PEER)
    return elapsed_s


async def drain_by_sidecar(stand: Stand, backlog: Backlog) -> tuple[float, float]:
    """Put slot and progress back to before the backlog, start the sidecar.

    Returns the seconds it took, and those of the sidecar's CPU.

    Raises:
        RuntimeError: it did not make one job of each row.
    """
    await stand.run("drop_slot", slot=stand.slot)
    await stand.run("copy_slot", source=BASE, slot=stand.slot)
    await stand.run("reset_progress", slot=stand.slot, lsn=backlog.start_lsn)
    await stand.run("empty_queue")
    async with stand.sidecar() as sidecar:
        started = await stand.wait_for("slot_is_active", slot=stand.slot)
        cpu_before_s = sidecar.cpu_s
        ended = await stand.wait_for("is_routed", slot=stand.slot, lsn=backlog.last_lsn)
        cpu_s = sidecar.cpu_s - cpu_before_s
    jobs = await stand.run("count_jobs")
    if jobs != backlog.shape.rows:
        raise RuntimeError(f"{jobs} jobs of {backlog.shape.rows} rows")
    return ended - started, cpu_s
