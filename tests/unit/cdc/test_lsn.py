import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.lsn import Lsn

from .strategies import lsns


@given(lsns)
def test_text_round_trip(value: int) -> None:
    lsn = Lsn.parse(str(Lsn(value)))
    assert lsn == value
    assert isinstance(lsn, Lsn)


def test_looks_like_postgres() -> None:
    lsn = Lsn.parse("0/16B3748")
    assert lsn == 0x16B3748
    assert f"{lsn}" == str(lsn) == "0/16B3748"
    assert repr(lsn) == "Lsn('0/16B3748')"
    assert str(Lsn.parse("aB/0000000f")) == "AB/F"
    assert Lsn() == 0


@pytest.mark.parametrize(
    "text",
    ["", "/", "0", "0/", "/0", "0/0 ", "g/0", "0/123456789", "0x1/0", "-1/0", "٣/0", "0/0/0"],
)
def test_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="an LSN looks like"):
        Lsn.parse(text)


@given(st.integers(max_value=-1) | st.integers(min_value=2**64))
def test_refuses_other_numbers(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        Lsn(value)
