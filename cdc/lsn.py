"""Positions in the write-ahead log.

An LSN is a byte offset of 64 bits, written by PostgreSQL as two hexadecimal halves (`0/16B3748`).
Hot paths carry plain integers and turn them into an `Lsn` where people read them.
"""

import re
from typing import Self

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", re.ASCII)


class Lsn(int):
    """A WAL position: an integer that prints as PostgreSQL does.

    >>> Lsn.parse("0/16B3748")
    Lsn('0/16B3748')
    >>> Lsn.parse("0/16B3748") + 8
    23803728
    """

    __slots__ = ()

    def __new__(cls, value: int = 0) -> Self:
        """Raise `ValueError` when `value` is not an unsigned integer of 64 bits."""
        if not 0 <= value < 1 << 64:
            raise ValueError(f"an LSN has 64 bits, not {value}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form `X/Y` of type pg_lsn; raise `ValueError` on anything else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"an LSN looks like 0/16B3748, not {text!r}")
        return cls(int(match[1], 16) << 32 | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn('{self}')"
