"""The API: it knows what it can ask for, and nothing of who does it.

A web framework would call `sign_up` and `order`; ``myapp-api`` calls both from the command line.
"""

import asyncio
import os
import sys
from uuid import UUID, uuid4

import psycopg
from myapp_schemas import events, tasks
from myapp_schemas.events import UserCreated, user_created
from myapp_schemas.tasks import (
    EmailSent,
    Item,
    OrderProcessed,
    ProcessOrder,
    SendEmail,
    process_order,
    send_email,
)

from conductor import Conductor, JobHandle

DSN = os.environ["CONDUCTOR_DSN"]

conductor = Conductor(DSN, tasks=tasks, events=events, app="myapp")


async def sign_up(email: str, name: str) -> JobHandle[EmailSent]:
    """Add a user, tell the others, ask for a mail: all of it is committed, or nothing is."""
    async with await psycopg.AsyncConnection.connect(DSN) as connection:
        cursor = await connection.execute(
            "insert into users (email, name) values (%s, %s) returning id", (email, name)
        )
        row: tuple[UUID] | None = await cursor.fetchone()
        assert row is not None  # noqa: S101 - an insert returns its row
        created = UserCreated(user_id=row[0], email=email)
        await conductor.emit(user_created, created, connection=connection)
        welcome = SendEmail(to=email, subject=f"Welcome, {name}")
        return await conductor.invoke(send_email, welcome, connection=connection)


async def order(customer: str, items: list[Item]) -> JobHandle[OrderProcessed]:
    """Hand an order to the workers; nobody waits for it here."""
    payload = ProcessOrder(order_id=uuid4(), customer=customer, items=items)
    return await conductor.invoke(process_order, payload)


async def visit(email: str, name: str) -> None:
    """Sign up, order two books, and wait for what the workers say."""
    async with conductor:
        welcome = await sign_up(email, name)
        bought = await order(email, [Item(product_id="book", quantity=2)])
        print((await welcome.result(timeout_s=60)).model_dump_json())
        print((await bought.result(timeout_s=60)).model_dump_json())


def main() -> None:
    """Visit as ``myapp-api EMAIL NAME``."""
    asyncio.run(visit(*sys.argv[1:3]))
