"""The warehouse: loads the whole stock anew, sells from it, writes some of it off."""

import random
from datetime import date, timedelta

import psycopg

from examples.shop.statements import STATEMENTS

FIRST_DAY = date(2026, 1, 1)


class Warehouse:
    """Acts on one connection, in a transaction of the caller.

    Args:
        connection: of one warehouse only: a load locks the table.
        rows: how many articles a load counts.
        rng: what decides.
    """

    def __init__(self, connection: psycopg.AsyncConnection, rows: int, rng: random.Random) -> None:
        self._connection = connection
        self._rows = rows
        self._rng = rng

    async def load(self) -> None:
        """Empty the table and count everything again: a truncate and one COPY."""
        rng = self._rng
        day = FIRST_DAY + timedelta(days=rng.randrange(365))
        await self._connection.execute(STATEMENTS["empty_stock"])
        async with (
            self._connection.cursor() as cursor,
            cursor.copy(STATEMENTS["load_stock"]) as copy,
        ):
            for sku in range(self._rows):
                shelf = f"{rng.choice('ABCDEF')}{rng.randrange(100):02}"
                counted, weight_kg = rng.randrange(1_000), rng.randrange(10_000) / 16
                await copy.write_row((sku, "north", shelf, counted, weight_kg, day))

    async def sell(self) -> None:
        """One article in a hundred is sold: many updates in one statement."""
        await self._connection.execute(
            STATEMENTS["sell_stock"], {"residue": self._rng.randrange(100)}
        )

    async def write_off(self) -> None:
        """One article in a thousand is gone."""
        await self._connection.execute(
            STATEMENTS["write_off_stock"], {"residue": self._rng.randrange(1_000)}
        )
