"""The workflow: reserve, wait for the money, weigh and write side by side, ship, tell.

Every effect on the database is there exactly once, whatever is killed: it commits together with the
step that made it. What an order waits for holds no slot, and survives every process.
"""

from datetime import timedelta
from typing import Any

from psycopg import AsyncConnection

from conductor import (
    Conductor,
    Context,
    Insert,
    Invocation,
    NonRetryable,
    OnChange,
    WaitTimeout,
)
from examples.fulfilment import statements
from examples.fulfilment.models import (
    Mail,
    Orders,
    Payments,
    Shipped,
    Weigh,
    Weighed,
    order_shipped,
    send_mail,
    weigh,
)

Connection = AsyncConnection[Any]

PAYMENT_TIMEOUT = timedelta(days=14)
UNIT_WEIGHT_G = 250

order_placed = OnChange(Orders, "insert")
order_paid = OnChange(Payments, "insert")


async def fulfil(event: Insert[Orders], ctx: Context) -> None:
    """Bring one order to its end: shipped, or given up when nobody pays."""
    order = event.new
    values = {"order_id": order.id, "item": order.item, "quantity": order.quantity}

    async def reserve(db: Connection) -> bool:
        cursor = await db.execute(statements.RESERVE, values)
        if cursor.rowcount:
            await db.execute(statements.NOTE_RESERVATION, values)
        return cursor.rowcount == 1

    async def release(db: Connection) -> None:
        await db.execute(statements.RELEASE, values)
        await db.execute(statements.FORGET_RESERVATION, values)

    paid = await ctx.subscribe("paid", order_paid, match={"order_id": order.id})
    if not await ctx.transaction("reserve", reserve):
        raise NonRetryable(f"{order.item} is sold out")
    await ctx.start("ask for money", send_mail, Mail(order_id=order.id, text="please pay"))
    try:
        payment = await paid.wait(timeout=PAYMENT_TIMEOUT)
    except WaitTimeout:
        await ctx.transaction("release", release)
        return
    weighed, _ = await ctx.gather(
        ctx.invoke("weigh", weigh, Weigh(item=order.item, quantity=order.quantity)),
        ctx.invoke(
            "thank", send_mail, Mail(order_id=order.id, text=f"thanks for {payment.new.amount}")
        ),
    )
    parcel = {"order_id": order.id, "weight_g": weighed.weight_g}

    async def ship(db: Connection) -> None:
        await db.execute(statements.BOOK_PARCEL, parcel)

    await ctx.transaction("ship", ship)
    await ctx.emit("tell", order_shipped, Shipped(**parcel))


async def weigh_item(event: Invocation[Weigh], _ctx: Context) -> Weighed:
    """Weigh an item."""
    return Weighed(weight_g=event.payload.quantity * UNIT_WEIGHT_G)


async def note_mail(event: Invocation[Mail], ctx: Context) -> None:
    """Send a message, as far as the example goes: once."""
    mail = event.payload

    async def note(db: Connection) -> None:
        await db.execute(statements.NOTE_MAIL, mail.model_dump())

    await ctx.transaction("note", note)


def create(dsn: str) -> Conductor[None]:
    """Return the application."""
    conductor = Conductor(dsn, tasks=[weigh, send_mail], events=[order_shipped], app="fulfilment")
    conductor.task("fulfil", order_placed, waits=[order_paid])(fulfil)
    conductor.task(weigh)(weigh_item)
    conductor.task(send_mail)(note_mail)
    return conductor
