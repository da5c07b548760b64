from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.errors import DefinitionInvalid
from conductor.retry import RetryPolicy


def test_delays_grow_up_to_the_longest() -> None:
    policy = RetryPolicy(initial_s=1, factor=2, max_s=10, jitter=0)
    assert [policy.delay_s(n, 0.5) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]


def test_jitter_spreads_around_the_delay() -> None:
    policy = RetryPolicy(initial_s=10, jitter=0.2)
    assert policy.delay_s(1, 0) == pytest.approx(8)
    assert policy.delay_s(1, 0.5) == pytest.approx(10)
    assert policy.delay_s(1, 0.999999) == pytest.approx(12, abs=0.001)


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True), st.floats(1, 1e6), st.floats(0, 1))
def test_never_negative_and_never_too_long(
    failures: int, randomness: float, factor: float, jitter: float
) -> None:
    delay_s = RetryPolicy(factor=factor, jitter=jitter).delay_s(failures, randomness)
    assert 0 <= delay_s <= 3600


@pytest.mark.parametrize(
    "wrong", [{"initial_s": -1}, {"factor": 0.5}, {"jitter": 1.5}, {"jitter": -0.1}, {"max_s": -1}]
)
def test_refuses_what_is_no_back_off(wrong: dict[str, Any]) -> None:
    with pytest.raises(DefinitionInvalid):
        RetryPolicy(**wrong)
