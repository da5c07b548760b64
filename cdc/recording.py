"""The file of a recorded stream: JSON lines, a header first.

::

    {"format": "cdc recording", "version": 1, "slot": "conductor", "plugin": "pgoutput", …}
    {"at_us": 1767323045670000, "frame": "dwAAAAA…"}           a CopyData payload, in base64
    {"shape": {"table": {…}, "types": […]}}                    what the catalog said (wal2json)

A shape stands before the frame that needed it. `write_*` return lines, `read` takes them apart.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

from cdc.catalog import Shape
from cdc.errors import CdcError, Retry
from cdc.wire.messages import Type
from cdc.wire.wal2json import CatalogColumn, CatalogTable

FORMAT: Final = "cdc recording"
VERSION: Final = 1


class RecordingInvalid(CdcError):  # noqa: N818  # named as the others of cdc.errors
    """The file is no recording, or one of a newer version."""

    retry = Retry.NEVER
    exit_code = 65
    hint = (
        "make one with `cdc record FILE`, and read it with the same version of cdc or a newer one"
    )


@dataclass(frozen=True, slots=True)
class Header:
    """Where a recording comes from."""

    slot: str
    plugin: str
    publication: str
    server_version: str
    system_identifier: str
    timeline: int
    database: str
    encoding: str
    recorded_at: str  # ISO 8601, by the clock of the recorder


@dataclass(frozen=True, slots=True)
class RecordedFrame:
    """A CopyData payload, and when it was received."""

    at_us: int
    frame: bytes


Entry: TypeAlias = RecordedFrame | Shape


def write_header(header: Header) -> str:
    """Return the first line."""
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}) + "\n"


def write_frame(at_us: int, frame: bytes) -> str:
    """Return the line of a frame."""
    return f'{{"at_us":{at_us},"frame":"{base64.b64encode(frame).decode()}"}}\n'


def write_shape(shape: Shape) -> str:
    """Return the line of an answer of the catalog."""
    return json.dumps({"shape": asdict(shape)}, default=sorted, ensure_ascii=False) + "\n"


def read(lines: Iterable[str]) -> tuple[Header, Iterator[Entry]]:
    """Return the header, and the entries as they are asked for.

    A last line that was cut off (the recorder was killed) is left out.

    Raises:
        RecordingInvalid: now, or while iterating.
    """
    rest = enumerate(lines, 1)
    try:
        _, first = next(rest)
        header = json.loads(first)
        known = header.pop("format") == FORMAT and header.pop("version") == VERSION
        described = Header(**header) if known else None
    except (StopIteration, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordingInvalid("the file does not begin as a recording does") from error
    if described is None:
        raise RecordingInvalid(f"the file is no recording of version {VERSION}")
    return described, _entries(rest)


def _entries(lines: Iterator[tuple[int, str]]) -> Iterator[Entry]:
    for number, line in lines:
        if not line.endswith("\n"):
            return
        try:
            yield _entry(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise RecordingInvalid(f"line {number} is none of a recording: {error}") from error


def _entry(fields: dict[str, Any]) -> Entry:
    if "frame" in fields:
        return RecordedFrame(int(fields["at_us"]), base64.b64decode(fields["frame"], validate=True))
    table, types = fields["shape"]["table"], fields["shape"]["types"]
    if table is not None:
        columns = tuple(CatalogColumn(**column) for column in table["columns"])
        generated = frozenset(table["own_generated"])
        table = CatalogTable(**{**table, "columns": columns, "own_generated": generated})
    return Shape(table, tuple(Type(**learnt) for learnt in types))
