"""The shop's tasks: what happens when its rows change.

Each handler ends by writing its job into a ledger, under the job's idempotency key: a real effect,
which the oracle checks by query. Run with `conductor worker examples.shop.tasks:orchestrator`.
"""

import os
from dataclasses import dataclass

from conductor import (
    Change,
    Conductor,
    Context,
    Cron,
    Delete,
    Emitted,
    Insert,
    Invocation,
    OnChange,
    OnEvent,
    Orchestrator,
    RetryPolicy,
    Tick,
    Update,
    define_event,
    define_task,
)
from conductor.errors import ColumnUnchanged
from examples.shop.ledger import Ledger
from examples.shop.models import (
    Order,
    OrderItem,
    OrderPaid,
    OrderStatus,
    Payment,
    Receipt,
    StockLevel,
    User,
    UserContact,
)

BUSY_EVERY = 25
"""The carrier refuses the first attempt of every so many shipments."""


class CarrierBusy(Exception):  # noqa: N818 - named for what happened
    """The carrier did not take the parcel; a later attempt will do."""


class Surprise(Exception):  # noqa: N818 - named for what happened
    """A handler got what its subscription rules out."""


@dataclass(frozen=True)
class Deps:
    """What the handlers share."""

    ledger: Ledger


DSN = os.environ.get("CONDUCTOR_DSN", "")
RETRY = RetryPolicy(initial_s=0.2, max_s=2.0)
ATTEMPTS = 20

send_receipt = define_task("send-receipt", payload=Receipt)
order_paid = define_event("order.paid", payload=OrderPaid)
conductor = Conductor(
    DSN, tasks=[send_receipt], events=[order_paid], context=Deps(Ledger(DSN)), app="shop"
)


async def enter(ctx: Context[Deps]) -> None:
    """Write the job into the ledger."""
    job = ctx.job
    await ctx.deps.ledger.record(job.idempotency_key, job.id, job.task)


@conductor.task("welcome-user", OnChange(UserContact, "insert"), retry=RETRY, max_attempts=ATTEMPTS)
async def welcome_user(event: Insert[UserContact], ctx: Context[Deps]) -> None:
    """Greet a new customer; only four columns are captured."""
    ctx.logger.debug("welcome, %d", event.new.id)
    await enter(ctx)


@conductor.task(
    "confirm-email",
    OnChange(User, "update", columns=("id", "email", "revision"), changed=lambda u: u.email),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def confirm_email(event: Update[User], ctx: Context[Deps]) -> None:
    """Ask for a confirmation, only when the address is another one."""
    if event.old.email == event.new.email:
        raise Surprise("the address is the same")
    await enter(ctx)


@conductor.task(
    "index-profile",
    OnChange(User, "update", changed=("bio", "name", "tags")),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def index_profile(event: Update[User], ctx: Context[Deps]) -> None:
    """Index what others can see of a customer; `bio` is there whatever the update touched."""
    ctx.logger.debug("%d characters", len(event.new.bio or ""))
    await enter(ctx)


@conductor.task("forget-user", OnChange(User, "delete"), retry=RETRY, max_attempts=ATTEMPTS)
async def forget_user(event: Delete[User], ctx: Context[Deps]) -> None:
    """Remove a customer elsewhere, too."""
    ctx.logger.debug("forget %d", event.old.id)
    await enter(ctx)


@conductor.task(
    "follow-order",
    OnChange(Order, "insert", "update", "delete"),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def follow_order(event: Change[Order], ctx: Context[Deps]) -> None:
    """Tell whoever follows an order; every operation in one handler."""
    ctx.logger.debug("order: %s", event.op)
    await enter(ctx)


@conductor.task(
    "ship-order",
    OnChange(OrderStatus, "update", changed=lambda o: o.status),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def ship_order(event: Update[OrderStatus], ctx: Context[Deps]) -> None:
    """Hand a parcel over; the carrier is busy at times, so this one is retried."""
    if event.new.revision % BUSY_EVERY == 0 and ctx.job.attempt == 0:
        raise CarrierBusy(f"order {event.new.id} is not on the van yet")
    await enter(ctx)


@conductor.task(
    "reserve-item",
    OnChange(OrderItem, "insert", "update", "delete"),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def reserve_item(event: Change[OrderItem], ctx: Context[Deps]) -> None:
    """Reserve an article, or release it: a delete shows the key alone under this identity."""
    ctx.logger.debug("item: %s", event.op)
    await enter(ctx)


@conductor.task(
    "settle-payment",
    OnChange(Payment, "insert", "update"),
    OnChange(Order, "delete", columns=("id", "total", "revision")),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def settle_payment(
    event: Insert[Payment] | Update[Payment] | Delete[Order], ctx: Context[Deps]
) -> None:
    """Book a payment, or refund a cancelled order: two tables, one task.

    An update does not carry the large receipt: reading it says so, and never gives an empty one.
    """
    if isinstance(event, Update):
        try:
            raise Surprise(f"a receipt of {len(event.new.receipt)} characters in an update")
        except ColumnUnchanged:
            ctx.logger.debug("receipt as before")
    await enter(ctx)


@conductor.task(
    "track-stock",
    OnChange(StockLevel, "insert", "update", "delete", "truncate"),
    retry=RETRY,
    max_attempts=ATTEMPTS,
)
async def track_stock(event: Change[StockLevel], ctx: Context[Deps]) -> None:
    """Keep stock levels; a load of the whole stock is a truncate and 20,000 inserts."""
    ctx.logger.debug("stock: %s", event.op)
    await enter(ctx)


@conductor.task(send_receipt, retry=RETRY, max_attempts=ATTEMPTS)
async def mail_receipt(event: Invocation[Receipt], ctx: Context[Deps]) -> None:
    """Mail a receipt: invoked in the transaction that takes the payment."""
    ctx.logger.debug("receipt of order %d", event.payload.order_id)
    await enter(ctx)


@conductor.task("thank-customer", OnEvent(order_paid), retry=RETRY, max_attempts=ATTEMPTS)
async def thank_customer(event: Emitted[OrderPaid], ctx: Context[Deps]) -> None:
    """Say thank you: subscribed to an event emitted in the same transaction."""
    ctx.logger.debug("thanks for order %d", event.payload.order_id)
    await enter(ctx)


@conductor.task("report-sales", Cron("* * * * *"), retry=RETRY, max_attempts=ATTEMPTS)
async def report_sales(event: Tick, ctx: Context[Deps]) -> None:
    """Report every minute, once across all workers."""
    ctx.logger.debug("report of %s", event.scheduled_at)
    await enter(ctx)


orchestrator = Orchestrator(
    conductor,
    tasks=[
        welcome_user,
        confirm_email,
        index_profile,
        forget_user,
        follow_order,
        ship_order,
        reserve_item,
        settle_payment,
        track_stock,
        mail_receipt,
        thank_customer,
        report_sales,
    ],
)
