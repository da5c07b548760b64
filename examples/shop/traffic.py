"""The traffic generator: what happens in the shop, bounded in time and in number.

Writers run side by side, each on a connection of its own and by a random generator of its own, so
that a seed gives the same statements again, however the writers interleave. Some transactions are
rolled back as a whole, some in part (savepoints, also nested ones), and now and then the stock is
loaded anew. A lost connection is opened again. What was committed, the oracle knows, not this.

    python -m examples.shop.traffic --dsn … --seconds 10
"""

import argparse
import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass

import psycopg

from examples.shop.shopping import Shopper
from examples.shop.statements import STATEMENTS
from examples.shop.stock import Warehouse

ROLLED_BACK = 0.1
WITH_SAVEPOINTS = 0.15
RECONNECT_S = 0.1
CONNECT_TIMEOUT_S = 30.0
LOAD_KINDS = ("commit", "rollback", "savepoint")


@dataclass(frozen=True)
class Plan:
    """How much traffic.

    `transactions` is the bound in number for each writer; `loads` come evenly spread over the time.
    """

    seed: int = 1
    seconds: float = 20.0
    writers: int = 3
    transactions: int = 1_000_000
    transactions_per_s: float = 120.0
    loads: int = 3
    load_rows: int = 20_000


@dataclass
class Totals:
    """What the writers did, as far as they know: an interrupted commit counts as `interrupted`."""

    committed: int = 0
    rolled_back: int = 0
    savepoints: int = 0
    loads: int = 0
    interrupted: int = 0


class Traffic:
    """Runs a plan against a database that has the shop's schema and the oracle.

    Example:
        traffic = Traffic(dsn, Plan(seconds=5))
        await traffic.run()
        print(traffic.totals)
    """

    def __init__(self, dsn: str, plan: Plan) -> None:
        self._dsn = dsn
        self._plan = plan
        self._deadline = 0.0
        self._stopped = asyncio.Event()
        self.totals = Totals()

    async def run(self) -> None:
        """Let every writer finish; returns after the last commit."""
        self._deadline = time.monotonic() + self._plan.seconds
        blocks = [await self._take_block() for _ in range(self._plan.writers)]  # in order
        async with asyncio.TaskGroup() as group:
            for number, block in enumerate(blocks):
                group.create_task(self._write(number, block))
            if self._plan.loads:
                group.create_task(self._load_stock())

    def stop(self) -> None:
        """End early: each writer finishes its transaction."""
        self._stopped.set()

    @property
    def _over(self) -> bool:
        return self._stopped.is_set() or time.monotonic() >= self._deadline

    async def _take_block(self) -> int:
        async with await self._connect() as connection:
            row = await (await connection.execute(STATEMENTS["take_block"])).fetchone()
        return int(row[0]) if row else 0

    async def _write(self, number: int, block: int) -> None:
        rng = random.Random(self._plan.seed * 1_000 + number)
        pace = Pace(self._plan.transactions_per_s / self._plan.writers)
        left = self._plan.transactions
        while left > 0 and not self._over:
            async with self._connection() as connection:
                shopper = Shopper(connection, block, rng)
                while left > 0 and not self._over:
                    left -= 1
                    await self._transact(shopper, rng)
                    await pace.wait()
            if left > 0 and not self._over:  # what an interrupted commit left behind is unknown
                block = await self._take_block()

    async def _transact(self, shopper: Shopper, rng: random.Random) -> None:
        before, fate = shopper.holdings, rng.random()
        if fate < ROLLED_BACK:
            async with shopper.connection.transaction(force_rollback=True):
                await self._act_several(shopper, rng)
            shopper.holdings = before
            self.totals.rolled_back += 1
            return
        async with shopper.connection.transaction():
            if fate < ROLLED_BACK + WITH_SAVEPOINTS:
                await self._act_in_savepoints(shopper, rng)
            else:
                await self._act_several(shopper, rng)
        self.totals.committed += 1

    async def _act_several(self, shopper: Shopper, rng: random.Random) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            await shopper.act()

    async def _act_in_savepoints(self, shopper: Shopper, rng: random.Random) -> None:
        """Act before, within and after savepoints, of which some are rolled back."""
        await shopper.act()
        for _ in range(rng.randint(1, 3)):
            async with self._savepoint(shopper, rng):
                await shopper.act()
                async with self._savepoint(shopper, rng):
                    await shopper.act()
        await shopper.act()

    @asynccontextmanager
    async def _savepoint(self, shopper: Shopper, rng: random.Random) -> AsyncIterator[None]:
        before, undone = shopper.holdings, rng.random() < 0.5
        async with shopper.connection.transaction(force_rollback=undone):
            yield
        self.totals.savepoints += 1
        if undone:
            shopper.holdings = before

    async def _load_stock(self) -> None:
        """Loads come in turn: committed, rolled back, and once more after a savepoint."""
        rng = random.Random(self._plan.seed)
        interval_s = self._plan.seconds / (self._plan.loads + 1)
        for number in range(self._plan.loads):
            await self._pause_until(self._deadline - self._plan.seconds + interval_s * number)
            if self._over:
                return
            async with self._connection() as connection:
                warehouse = Warehouse(connection, self._plan.load_rows, rng)
                await self._load(connection, warehouse, LOAD_KINDS[number % len(LOAD_KINDS)])
                self.totals.loads += 1
                await self._in_transaction(connection, warehouse.sell)
                await self._in_transaction(connection, warehouse.write_off)

    async def _pause_until(self, instant: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), max(instant - time.monotonic(), 0))

    async def _load(
        self, connection: psycopg.AsyncConnection, warehouse: Warehouse, kind: str
    ) -> None:
        async with connection.transaction(force_rollback=kind == "rollback"):
            if kind == "savepoint":
                async with connection.transaction(force_rollback=True):
                    await warehouse.load()
            await warehouse.load()

    async def _in_transaction(
        self, connection: psycopg.AsyncConnection, act: Callable[[], Awaitable[None]]
    ) -> None:
        async with connection.transaction():
            await act()
        self.totals.committed += 1

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """A connection; when it is lost, the block ends early and is counted as interrupted."""
        connection = await self._connect()
        try:
            async with connection:
                yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError):
            self.totals.interrupted += 1

    async def _connect(self) -> psycopg.AsyncConnection:
        while True:
            try:
                return await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
            except psycopg.OperationalError:
                if time.monotonic() > self._deadline + CONNECT_TIMEOUT_S:
                    raise
                await asyncio.sleep(RECONNECT_S)


class Pace:
    """Keeps a rate, without catching up after a pause."""

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._next_at = time.monotonic()

    async def wait(self) -> None:
        """Return when the next turn has come."""
        now = time.monotonic()
        self._next_at = max(self._next_at + self._interval_s, now)
        await asyncio.sleep(self._next_at - now)


def main() -> None:
    """Run a plan from the command line and print what was done."""
    parser = argparse.ArgumentParser(prog="python -m examples.shop.traffic")
    parser.add_argument("--dsn", default=os.environ.get("CONDUCTOR_DSN", ""))
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--writers", type=int, default=Plan.writers)
    parser.add_argument("--transactions-per-s", type=float, default=Plan.transactions_per_s)
    parser.add_argument("--loads", type=int, default=Plan.loads)
    parser.add_argument("--load-rows", type=int, default=Plan.load_rows)
    options = vars(parser.parse_args())
    traffic = Traffic(options.pop("dsn"), Plan(**options))
    asyncio.run(traffic.run())
    print(", ".join(f"{name} {count}" for name, count in asdict(traffic.totals).items()))


if __name__ == "__main__":
    main()
