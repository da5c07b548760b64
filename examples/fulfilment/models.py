"""The rows and messages of the example."""

from pydantic import BaseModel

from conductor import TableRow, define_event, define_task


class Orders(TableRow, table="public.orders"):
    """An order that a customer has placed."""

    id: int
    item: str
    quantity: int


class Payments(TableRow, table="public.payments"):
    """Money that has come in for an order."""

    order_id: int
    amount: int


class Weigh(BaseModel):
    """Weigh so many units of an item."""

    item: str
    quantity: int


class Weighed(BaseModel):
    """What they weigh."""

    weight_g: int


class Mail(BaseModel):
    """A message to who placed an order."""

    order_id: int
    text: str


class Shipped(BaseModel):
    """An order is on its way."""

    order_id: int
    weight_g: int


weigh = define_task("weigh", payload=Weigh, returns=Weighed)
send_mail = define_task("send-mail", payload=Mail)
order_shipped = define_event("order.shipped", payload=Shipped)
