"""The SQL of the example."""

from typing import Final

RESERVE: Final = """
    update stock set units_left = units_left - %(quantity)s
    where item = %(item)s and units_left >= %(quantity)s
"""
NOTE_RESERVATION: Final = """
    insert into reservations (order_id, item, quantity)
    values (%(order_id)s, %(item)s, %(quantity)s)
"""
RELEASE: Final = "update stock set units_left = units_left + %(quantity)s where item = %(item)s"
FORGET_RESERVATION: Final = "delete from reservations where order_id = %(order_id)s"
BOOK_PARCEL: Final = "insert into parcels (order_id, weight_g) values (%(order_id)s, %(weight_g)s)"
NOTE_MAIL: Final = "insert into mails (order_id, text) values (%(order_id)s, %(text)s)"
