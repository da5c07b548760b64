"""The shop's tables and messages, as its handlers see them."""

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from conductor import TableRow


class User(TableRow, table="shop.users"):
    """A customer; `bio` can be large."""

    id: int
    email: str
    name: str
    tags: list[str]
    bio: str | None
    joined_at: datetime
    revision: int


class UserContact(TableRow, table="shop.users"):
    """The columns of a user that a welcome letter needs, and no others."""

    id: int
    email: str
    name: str
    revision: int


class Order(TableRow, table="shop.orders"):
    """An order; its items and payments are rows of their own."""

    id: int
    user_id: int
    status: str
    total: Decimal
    note: str | None
    placed_at: datetime
    revision: int


class OrderStatus(TableRow, table="shop.orders"):
    """What a carrier needs to know of an order."""

    id: int
    status: str
    revision: int


class OrderItem(TableRow, table="shop.order_items"):
    """One line of an order."""

    order_id: int
    position: int
    sku: str
    quantity: int
    price: Decimal
    revision: int


class Payment(TableRow, table="shop.payments"):
    """A payment; `receipt` is large, and updates leave it alone."""

    id: UUID
    order_id: int
    amount: Decimal
    captured: bool
    details: dict[str, Any]
    receipt: str
    revision: int


class StockLevel(TableRow, table="shop.stock_counts"):
    """How much of an article was counted; where it lies is of no interest here."""

    sku: int
    counted: int
    revision: int


class Receipt(BaseModel):
    """What `send-receipt` is invoked with. The token names the invocation for the oracle."""

    order_id: int
    token: str


class OrderPaid(BaseModel):
    """The event `order.paid`. The token names the emission for the oracle."""

    order_id: int
    token: str
