"""What people do in the shop: one method an action, a few statements in the caller's transaction.

A shopper owns its rows: its keys come from a block of its own, so that shoppers never wait for each
other. What it does follows from its random generator alone. Its memory of its rows (`Holdings`) is
immutable, so that a caller who rolls back can put the old one back.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from examples.shop.models import Receipt
from examples.shop.statements import STATEMENTS
from examples.shop.tasks import conductor, send_receipt

KEYS_PER_BLOCK = 1_000_000
MAX_HELD = 60
MAX_ITEMS = 5
LARGE_TEXT_BYTES = (4_000, 12_000)
STATUSES = ("packed", "sent", "delivered", "returned")


@dataclass(frozen=True)
class HeldOrder:
    """An order of the shopper, as far as the next action needs to know it."""

    id: int
    next_position: int
    paid: bool = False


@dataclass(frozen=True)
class Holdings:
    """The rows that the shopper can still act on, oldest first."""

    users: tuple[int, ...] = ()
    orders: tuple[HeldOrder, ...] = ()


class Shopper:
    """Acts on one connection; `act` does one thing at random.

    Args:
        connection: in a transaction of the caller, or in autocommit mode.
        block: which keys are the shopper's own.
        rng: what decides.
    """

    def __init__(self, connection: psycopg.AsyncConnection, block: int, rng: random.Random) -> None:
        self.connection = connection
        self.holdings = Holdings()
        self._rng = rng
        self._next_key = block * KEYS_PER_BLOCK
        actions: tuple[tuple[Callable[[], Awaitable[None]], int], ...] = (
            (self.sign_up, 12),
            (self.edit_profile, 16),
            (self.place_order, 20),
            (self.pay, 14),
            (self.advance_order, 14),
            (self.annotate_order, 6),
            (self.capture_payment, 8),
            (self.change_items, 8),
            (self.cancel_order, 4),
            (self.close_account, 2),
        )
        self._actions = [action for action, _ in actions]
        self._weights = [weight for _, weight in actions]

    async def act(self) -> None:
        """Do one thing; sign up first when it cannot be done yet."""
        (action,) = self._rng.choices(self._actions, self._weights)
        if not self.holdings.users:
            action = self.sign_up
        elif not self.holdings.orders and action not in {self.sign_up, self.edit_profile}:
            action = self.place_order
        await action()

    async def sign_up(self) -> None:
        """A new customer, every other one with a long biography."""
        user = self._key()
        await self._run(
            "add_user",
            id=user,
            email=f"{self._word()}@example.com",
            name=self._word().title(),
            tags=[self._word() for _ in range(self._rng.randrange(3))],
            bio=self._large_text() if self._rng.random() < 0.5 else None,
        )
        users = (*self.holdings.users, user)[-MAX_HELD:]
        self.holdings = replace(self.holdings, users=users)

    async def edit_profile(self) -> None:
        """Change one thing of a customer, or nothing at all."""
        user = self._rng.choice(self.holdings.users)
        kind = self._rng.randrange(5)
        if kind == 0:
            await self._run("change_email", id=user, email=f"{self._word()}@example.org")
        elif kind == 1:
            await self._run("change_name", id=user, name=self._word(), tags=["a b", 'c"d', ""])
        elif kind == 2:
            await self._run("change_bio", id=user, bio=self._large_text())
        else:
            await self._run("rewrite_bio" if kind == 3 else "touch_user", id=user)

    async def place_order(self) -> None:
        """An order with its items: rows of two tables in one transaction."""
        order, items = self._key(), self._rng.randint(1, MAX_ITEMS)
        prices = [round(self._rng.uniform(0.01, 99.99), 2) for _ in range(items)]
        await self._run(
            "add_order",
            id=order,
            user_id=self._rng.choice(self.holdings.users),
            total=round(sum(prices), 2),
            note=self._large_text() if self._rng.random() < 0.2 else None,
        )
        await self._run(
            "add_items",
            order_id=order,
            positions=list(range(1, items + 1)),
            skus=[self._word() for _ in range(items)],
            quantities=[self._rng.randint(1, 9) for _ in range(items)],
            prices=prices,
        )
        self._hold(HeldOrder(order, items + 1))

    async def pay(self) -> None:
        """Payment, status, an invocation and an event: together or not at all."""
        order = self._rng.choice(self.holdings.orders)
        if order.paid:
            await self._run("capture_payment", order_id=order.id)
            return
        payment = UUID(int=self._rng.getrandbits(128), version=4)
        details = {"card": self._word(), "fee": 1.5, "tries": [1, None, {"ok": True}]}
        await self._run(
            "add_payment",
            id=payment,
            order_id=order.id,
            details=Jsonb(details),
            receipt=self._large_text(),
        )
        await self._run("advance_order", id=order.id, status="paid")
        token = str(payment)
        await self._run("expect_call", task="send-receipt", token=token)
        await conductor.invoke(
            send_receipt, Receipt(order_id=order.id, token=token), connection=self.connection
        )
        await self._run("expect_call", task="thank-customer", token=token)
        await self._run("emit_paid", order_id=order.id, token=token)
        self._hold(replace(order, paid=True))

    async def advance_order(self) -> None:
        """Another status, or the same again."""
        order = self._rng.choice(self.holdings.orders)
        await self._run("advance_order", id=order.id, status=self._rng.choice(STATUSES))

    async def annotate_order(self) -> None:
        """A long note, or none any more."""
        order = self._rng.choice(self.holdings.orders)
        note = self._large_text() if self._rng.random() < 0.7 else None
        await self._run("annotate_order", id=order.id, note=note)

    async def capture_payment(self) -> None:
        """An update that leaves the large receipt alone."""
        order = self._rng.choice(self.holdings.orders)
        await self._run("capture_payment", order_id=order.id)

    async def change_items(self) -> None:
        """Change the items of an order: quantities, keys, fewer of them, or one more."""
        order = self._rng.choice(self.holdings.orders)
        kind = self._rng.randrange(4)
        if kind == 0:
            await self._run("change_quantities", order_id=order.id)
        elif kind == 1:
            await self._run("move_items", order_id=order.id)
        elif kind == 2:
            await self._run("remove_items", order_id=order.id, quantity=self._rng.randint(3, 8))
        else:
            position = order.next_position
            item = {"positions": [position], "skus": ["gift"], "quantities": [1], "prices": [0]}
            await self._run("add_items", order_id=order.id, **item)
            self._hold(replace(order, next_position=position + 1))

    async def cancel_order(self) -> None:
        """Remove an order; its items and payments go with it."""
        order = self._rng.choice(self.holdings.orders)
        await self._run("remove_order", id=order.id)
        kept = tuple(held for held in self.holdings.orders if held.id != order.id)
        self.holdings = replace(self.holdings, orders=kept)

    async def close_account(self) -> None:
        """Remove a customer and all that hangs on it; the shopper starts anew."""
        for user in self.holdings.users[:2]:
            await self._run("remove_user", id=user)
        self.holdings = Holdings(users=self.holdings.users[2:])

    def _hold(self, order: HeldOrder) -> None:
        others = tuple(held for held in self.holdings.orders if held.id != order.id)
        self.holdings = replace(self.holdings, orders=(*others, order)[-MAX_HELD:])

    async def _run(self, statement: str, **parameters: Any) -> None:
        await self.connection.execute(STATEMENTS[statement], parameters)

    def _key(self) -> int:
        self._next_key += 1
        return self._next_key

    def _word(self) -> str:
        return self._rng.randbytes(self._rng.randint(3, 8)).hex()

    def _large_text(self) -> str:
        return self._rng.randbytes(self._rng.randint(*LARGE_TEXT_BYTES) // 2).hex()
