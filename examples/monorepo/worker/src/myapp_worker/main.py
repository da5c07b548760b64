"""The worker: a handler for each task, and for what happens in the database.

Start it with ``myapp-worker``, or with ``conductor worker myapp_worker.main:orchestrator``.
"""

import asyncio
import os
from decimal import Decimal
from typing import Any

from myapp_schemas import database_types, events, tasks
from myapp_schemas.database_types import PublicUsers
from myapp_schemas.events import UserCreated, user_created
from myapp_schemas.tasks import (
    EmailSent,
    OrderProcessed,
    ProcessOrder,
    SendEmail,
    process_order,
    send_email,
)
from psycopg import AsyncConnection

from conductor import (
    Conductor,
    Context,
    Database,
    Emitted,
    Insert,
    Invocation,
    OnChange,
    OnEvent,
    Orchestrator,
)

PRICES = {"book": Decimal("12.50"), "pen": Decimal("1.20")}

conductor = Conductor(
    os.environ["CONDUCTOR_DSN"],
    tasks=tasks,
    events=events,
    database=Database.from_module(database_types),
    app="myapp",
)


@conductor.task(send_email, max_attempts=5)
async def send(event: Invocation[SendEmail], ctx: Context) -> EmailSent:
    """Send a mail. The job's id stands for what a mail server would answer."""
    ctx.logger.info("a mail about %r", event.payload.subject)
    return EmailSent(sent=True, message_id=f"msg-{ctx.job.id}")


@conductor.task(process_order)
async def process(event: Invocation[ProcessOrder], ctx: Context) -> OrderProcessed:
    """Price an order, and confirm it by the other task: its result is typed."""
    order = event.payload
    total = sum((PRICES[item.product_id] * item.quantity for item in order.items), Decimal(0))
    mail = SendEmail(to=order.customer, subject=f"Order {order.order_id}: {total} €")
    confirmation = await ctx.invoke("confirm", send_email, mail)
    return OrderProcessed(total=total, confirmation=confirmation)


@conductor.task(
    "greet",
    OnEvent(user_created),
    OnChange(
        PublicUsers,
        "insert",
        columns=lambda user: (user.id, user.email, user.name),
        when='new.email.endsWith("@example.com")',
    ),
)
async def greet(event: Emitted[UserCreated] | Insert[PublicUsers], ctx: Context) -> None:
    """Note, exactly once, who has come: told by the API, and seen in the table."""
    match event:
        case Emitted():
            email, reason = event.payload.email, "event"
        case Insert():
            email, reason = event.new.email, f"row of {event.new.name}"

    async def note(db: AsyncConnection[Any]) -> None:
        await db.execute("insert into greetings (email, reason) values (%s, %s)", (email, reason))

    await ctx.transaction("note", note)


orchestrator = Orchestrator(conductor, tasks=[send, process, greet])


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    asyncio.run(orchestrator.run())
