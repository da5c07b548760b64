"""The changes of one source transaction in one job: `group="transaction"`.

A group collects the job specs that a subscription would have got, and becomes one at the end of the
transaction. It is bounded: beyond `GROUP_CHANGES` or `GROUP_BYTES` it is split into parts, each a
job, numbered, the last one marked. Where it is split depends on the changes alone, so that a replay
splits alike; a part's identity is that of its first change. Pure::

    {"op": "transaction", "part": 0, "last": true, "changes": [{"op": "insert", …}, …]}
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from conductor.contract import JobSpec

GROUP_CHANGES: Final = 10_000
"""Changes in one job."""

GROUP_BYTES: Final = 4 << 20
"""Bytes of their JSON in one job, unless one change alone is larger."""

ALL_GROUPS_BYTES: Final = 16 << 20
"""Bytes that the groups of one transaction hold together; then the largest is split."""

_ID_BYTES: Final = 8


@dataclass(slots=True)
class _Group:
    specs: list[JobSpec] = field(default_factory=list)
    size_bytes: int = 0
    part: int = 0


class TransactionGroups:
    """The groups of the transaction at hand, one a subscription.

    By its id, with which the head of its jobs ends: the version in it may change meanwhile.
    """

    __slots__ = ("_groups", "size_bytes")

    def __init__(self) -> None:
        self._groups: dict[bytes, _Group] = {}
        self.size_bytes = 0

    def add(self, spec: JobSpec) -> Iterator[JobSpec]:
        """Add a change; yield the parts that are full."""
        group = self._groups.setdefault(spec.head[-_ID_BYTES:], _Group())
        size_bytes = len(spec.payload)
        full = len(group.specs) >= GROUP_CHANGES or group.size_bytes + size_bytes > GROUP_BYTES
        if full and group.specs:
            yield self._take(group, len(group.specs), last=False)
        group.specs.append(spec)
        group.size_bytes += size_bytes
        self.size_bytes += size_bytes
        if self.size_bytes > ALL_GROUPS_BYTES:
            # One stays in each: what it is the last of is not known yet.
            many = [group for group in self._groups.values() if len(group.specs) > 1]
            if many:
                largest = max(many, key=lambda group: group.size_bytes)
                yield self._take(largest, len(largest.specs) - 1, last=False)

    def end(self) -> Iterator[JobSpec]:
        """Yield what is left, in the order of the first changes: the transaction is over."""
        groups, self._groups = self._groups, {}
        for group in sorted(groups.values(), key=lambda group: group.specs[0].ordinal):
            yield self._take(group, len(group.specs), last=True)
        self.size_bytes = 0

    def _take(self, group: _Group, count: int, *, last: bool) -> JobSpec:
        taken, group.specs = group.specs[:count], group.specs[count:]
        first, part = taken[0], group.part
        head = b'{"op":"transaction","part":%d,"last":%b,"changes":[' % (
            part,
            b"true" if last else b"false",
        )
        size_bytes = sum(len(spec.payload) for spec in taken)
        group.size_bytes -= size_bytes
        self.size_bytes -= size_bytes
        group.part += 1
        payload = head + b",".join([spec.payload for spec in taken]) + b"]}"
        return JobSpec(first.head, first.position, first.ordinal, payload)
