"""The key of a change's job: which columns it is made of, and what the WAL tells of them. Pure."""

from collections.abc import Sequence

from cdc.errors import ValueUndecodable
from cdc.relations import RelationShape
from cdc.wire.messages import Row, Unchanged
from conductor.contract import job_key


class RowKey:
    """Which columns of a table are the key of a subscription's jobs.

    None given: those of the replica identity, unless that is the whole row.
    """

    __slots__ = ("_columns", "_missing", "identifies", "may_identify")

    def __init__(self, columns: Sequence[str], shape: RelationShape) -> None:
        names = shape.column_names
        identity = shape.key_indexes if shape.replica_identity != "f" else ()
        indexes = [names.index(n) for n in columns if n in names] if columns else identity
        self._columns = [(i, names[i], shape.converters[i]) for i in indexes]
        self._missing = [name for name in columns if name not in names]
        self.identifies = bool(shape.key_indexes) and set(shape.key_indexes).issubset(indexes)
        """Whether two rows of the table at one time never have the same key."""
        self.may_identify = self.identifies or shape.replica_identity == "f"
        """Whether the stream does not tell that they can: a whole row as identity hides its key."""

    def read(self, row: Row) -> str:
        """Return a row's key. Raises ValueUndecodable when the WAL does not tell it."""
        if self._missing or not self._columns:
            what = ", ".join(map(repr, self._missing)) or "columns that identify a row"
            raise ValueUndecodable(f"the key of the job: the table has no {what}")
        values: list[bytes] = []
        for index, name, convert in self._columns:
            value = row[index]
            if isinstance(value, Unchanged):
                raise ValueUndecodable(f"the key of the job: {name!r} is not in the WAL")
            values.append(b"null" if value is None else convert(value))
        return job_key(values)
