"""Messages to pgoutput bytes: what is encoded decodes again, and is what a server would write."""

from hypothesis import given

from cdc.wire.encoding import encode
from cdc.wire.messages import Message
from cdc.wire.pgoutput import decode
from tests.unit.cdc import pgoutput_encoder
from tests.unit.cdc.strategies import messages


@given(messages)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages)
def test_as_a_server_writes_it(message: Message) -> None:
    assert encode(message) == pgoutput_encoder.encode(message)
