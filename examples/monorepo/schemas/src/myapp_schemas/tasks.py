"""Tasks: what can be asked for, and what comes back."""

from decimal import Decimal
from uuid import UUID

from pydantic import BaseModel, EmailStr, PositiveInt

from conductor import define_task


class SendEmail(BaseModel):
    """A mail to one person."""

    to: EmailStr
    subject: str


class EmailSent(BaseModel):
    """What became of it."""

    sent: bool
    message_id: str


class Item(BaseModel):
    """A line of an order."""

    product_id: str
    quantity: PositiveInt


class ProcessOrder(BaseModel):
    """An order to price and to confirm."""

    order_id: UUID
    customer: EmailStr
    items: list[Item]


class OrderProcessed(BaseModel):
    """What the customer pays."""

    total: Decimal
    confirmation: EmailSent


send_email = define_task("send-email", payload=SendEmail, returns=EmailSent)
process_order = define_task("process-order", payload=ProcessOrder, returns=OrderProcessed)
