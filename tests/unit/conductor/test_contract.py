from __future__ import annotations

import pytest

from conductor.contract import LANE_KEY_LENGTH, encode_head, job_key, queue_and_task


@pytest.mark.parametrize(
    "values, key",
    [
        ([b"7"], "7"),
        ([b'"a\\"b"'], 'a"b'),
        ([b"null"], "null"),
        ([b"1.10"], "1.10"),
        ([b'"a"', b"7"], '["a",7]'),
        ([b'"\\ud800"'], '"\\ud800"'),
    ],
)
def test_a_key_is_the_text_of_a_value_or_an_array(values: list[bytes], key: str) -> None:
    assert job_key(values) == key


def test_long_keys_are_cut_and_stay_apart() -> None:
    first, second = (job_key([b'"%b%b"' % (b"a" * 1000, end)]) for end in (b"x", b"y"))
    assert first != second
    assert len(first) == len(second) == LANE_KEY_LENGTH


def test_a_head_tells_its_queue_and_task() -> None:
    head = encode_head(
        queue="qüe", task="t", app=None, version=None, trigger="change", rank=0, subscription=1
    )
    assert queue_and_task(head) == ("qüe", "t")
