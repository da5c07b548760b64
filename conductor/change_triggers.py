"""What a trigger of changes does, whatever its operations: the half of `OnChange` without types.

A trigger is checked when it is made, gives what is stored of it (`conductor.matching` filters) and
turns a job's payload into the handler's event. Payload envelopes are those of `conductor.contract`.
Pure: nothing here asks a database.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any, Final, Generic, Union, cast, get_args

from pydantic import BaseModel, JsonValue
from typing_extensions import TypeVar, override

from conductor import filters
from conductor.arguments import check_type
from conductor.change_options import all_columns, coalesce_s_of, model_of, operations_of
from conductor.codec import INVALID
from conductor.columns import Columns, resolve_columns
from conductor.definitions import TaskDefinition, Trigger, payload_invalid
from conductor.errors import DefinitionInvalid, FilterInvalid
from conductor.events import (
    Change,
    Delete,
    Insert,
    Lacking,
    Transaction,
    Truncate,
    Update,
)
from conductor.filter_types import check_operands
from conductor.matching import (
    OPERATIONS,
    ChangeFilter,
    Group,
    Operation,
    change_topic,
)
from conductor.rows import (
    PlainRow,
    TableName,
    column_kinds,
    column_names,
    is_unresolved,
    read_row,
    row_model,
    source_name,
    source_of,
    table_name,
)

E_co = TypeVar("E_co", covariant=True, default=Any)

_WITHOUT: dict[str, frozenset[Operation]] = {
    "new": frozenset({"delete", "truncate"}),
    "old": frozenset({"insert", "truncate"}),
}
_ROW_HINT: Final = "`conductor check` shows how the row model differs from the table."
_CHANGES: Final[dict[str, Any]] = {
    "insert": Insert,
    "update": Update,
    "delete": Delete,
    "truncate": Truncate,
}


class ChangeTrigger(Trigger[E_co], Generic[E_co]):
    """The task runs for committed changes of a table; see `conductor.triggers.OnChange`.

    Raises UnknownColumn for a column the model does not have, and DefinitionInvalid.
    """

    kind = "change"

    def __init__(
        self,
        row: type[Any] | str,
        operations: tuple[Operation, ...],
        *,
        columns: Columns[Any] | None = None,
        changed: Columns[Any] | None = None,
        when: str | None = None,
        refetch: bool = False,
        group: Group | None = None,
        source: str | None = None,
        key: Columns[Any] | None = None,
        coalesce_s: float | None = None,
    ) -> None:
        self._model = model_of(row)
        self._table = TableName.parse(row) if isinstance(row, str) else None
        wanted = operations_of(operations)
        if changed is not None and "update" not in wanted:
            raise DefinitionInvalid("changed= is about updates, and this trigger has none")
        if refetch and not wanted & {"insert", "update"}:
            raise DefinitionInvalid("refetch= is about new rows, and this trigger has none")
        if group not in (None, *get_args(Group)):
            raise DefinitionInvalid(f"group={group!r}", hint='group="transaction", or none.')
        check_type("source", source, (str, type(None)), 'source="billing"')
        if refetch and group is not None:
            raise DefinitionInvalid("refetch= is for single changes, not for group=")
        self.refetch = refetch
        self._group = group
        self._source = source
        self._operations = wanted
        self._columns = resolve_columns(self._model, columns) or all_columns(self._model)
        self._changed = resolve_columns(self._model, changed)
        self._when = when
        self.key = resolve_columns(self._model, key) or ()
        self.coalesce_s = coalesce_s_of(coalesce_s, wanted, group)
        if when is not None:
            self._check_when(filters.compile(when), wanted)

    @property
    def model(self) -> type[BaseModel] | None:
        """The row model it was given; None for a table by name."""
        return self._model

    @property
    def group(self) -> Group | None:
        """What becomes one job: None for each change its own."""
        return self._group

    @property
    def model_to_resolve(self) -> type[BaseModel] | None:
        """The model whose table is not known before registration; None when it is known."""
        return self._model if is_unresolved(self._model) else None

    @property
    def table(self) -> TableName:
        """The table. Raises DefinitionInvalid as long as there is a `model_to_resolve`."""
        if self._table is None and self._model is not None:
            self._table = table_name(self._model)
        assert self._table is not None  # noqa: S101 - a name or a model was given
        return self._table

    @property
    def source(self) -> str:
        """The name of the database that the changes come from."""
        return self._source or source_of(self._model)

    @property
    def operations(self) -> frozenset[Operation]:
        """The operations it fires on."""
        return self._operations

    @property
    def filter(self) -> ChangeFilter:
        """What is stored of it. Raises as `table` does."""
        return ChangeFilter(
            schema=self.table.schema,
            table=self.table.table,
            operations=self._operations,
            columns=self._columns,
            changed=self._changed,
            when=self._when,
            group=self._group,
            key=self.key,
            coalesce_s=self.coalesce_s,
        )

    def filter_of(self, task: TaskDefinition[Any, Any]) -> ChangeFilter:
        """Return what is stored of it as a trigger of a task. Raises as `table` does."""
        return replace(self.filter, ordered=True) if task.ordered else self.filter

    @property
    @override
    def name(self) -> str:
        """``change:``, the table and the operations."""
        operations = ",".join(op for op in OPERATIONS if op in self.filter.operations)
        return f"change:{self.table}:{operations}"

    @property
    @override
    def topic(self) -> str:
        """What a job waits for that waits for such a change."""
        return change_topic(self.filter, self.source)

    @property
    @override
    def claims(self) -> frozenset[str]:
        """The operations on the table."""
        where = str(self.table) if self.model_to_resolve is None else repr(self._model)
        return frozenset(f"{op} on {where}" for op in self._operations)

    @override
    def gives(self, task: TaskDefinition[Any, Any]) -> tuple[Any, ...]:
        """Changes of its operations, of its model; or transactions of them."""
        row = self._model or dict[str, JsonValue]
        operations = [op for op in OPERATIONS if op in self._operations]
        changes: list[Any] = [_CHANGES[op][row] for op in operations]
        group, union = cast("Any", Transaction), cast("Any", Union)
        return tuple(changes) if self._group is None else (group[union[tuple(changes)]],)

    @override
    def accepts(self, envelope: dict[str, Any]) -> bool:
        """Return whether the job stands for a change of this table and an operation of these."""
        if self._group is not None:
            changes = envelope.get("changes") or [{}]
            return self._is_of(changes[0])
        return self._is_of(envelope)

    def _is_of(self, envelope: dict[str, Any]) -> bool:
        return (
            envelope.get("op") in self._operations
            and envelope.get("table") == self.table.table
            and envelope.get("schema") == self.table.schema
        )

    @override
    def decode(self, task: TaskDefinition[Any, Any], envelope: dict[str, Any]) -> E_co:
        """Read a change's envelope. Raises PayloadInvalid for a row that is not the model's."""
        try:
            change: Any = self._transaction(envelope) if self._group else self._change(envelope)
        except (*INVALID, KeyError) as error:
            what = f"{envelope.get('op')} on {self.table} for task {task.name!r}"
            raise payload_invalid(what, error, _ROW_HINT) from error
        found: E_co = change
        return found

    def _check_when(self, when: filters.Filter, operations: frozenset[Operation]) -> None:
        filters.check_names(when, filters.CHANGE_NAMES)
        if self._model is not None:
            columns = column_names(self._model).values()
            filters.check_columns(when, columns, f"of {source_name(self._model)}")
            check_operands(when, column_kinds(self._model))
        read = when.references
        if read.reads_changed and "update" not in operations:
            raise FilterInvalid(f"filter {when.source!r}: `changed` is about updates")
        for name, lacking in _WITHOUT.items():
            absent = operations & lacking
            if read.columns[name] and absent and not ("op" in read.names or name in read.whole):
                raise FilterInvalid(
                    f"filter {when.source!r}: {name} is null for {' and '.join(sorted(absent))}",
                    hint=f"Name the operations, or guard it: {name} != null && …",
                )

    def _transaction(self, envelope: dict[str, Any]) -> Transaction[Any]:
        changes = tuple(self._change(change) for change in envelope["changes"])
        return Transaction(changes, part=envelope["part"], is_last=envelope["last"])

    def _change(self, envelope: dict[str, Any]) -> Change[Any]:
        common: dict[str, Any] = {
            "schema": self.table.schema,
            "table": self.table.table,
            "commit_time": datetime.fromisoformat(envelope["commit_time"]),
            "commit_lsn": envelope["commit_lsn"],
        }
        op = envelope["op"]
        if op == "truncate":
            flags = {key: envelope[key] for key in ("cascade", "restart_identity")}
            return Truncate(**common, **flags)
        unchanged = frozenset(envelope.get("unchanged", ()))
        changed = envelope.get("changed")
        found: Change[Any] = _CHANGES[op](
            **common,
            lacking=self._lacking(envelope["new"], unchanged) if op != "delete" else None,
            new=None if op == "delete" else self._row(envelope["new"], unchanged),
            old=None if op == "insert" else self._row(envelope.get("old") or {}, frozenset()),
            changed=None if changed is None else frozenset(changed),
        )
        return found

    def _lacking(self, values: dict[str, Any], unchanged: frozenset[str]) -> Lacking | None:
        """Return what is to be read again of a new row."""
        if not self.refetch:
            return None
        wanted = unchanged if self._model is None else column_names(self._model).values()
        columns = tuple(column for column in wanted if column not in values)
        if not columns:
            return None

        def read(found: dict[str, Any], gone: bool) -> Any:  # noqa: FBT001 - see Lacking
            try:
                return self._row(found, unchanged if gone else frozenset(), gone=gone)
            except INVALID as error:
                what = f"row of {self.table}, read again"
                raise payload_invalid(what, error, _ROW_HINT) from error

        return Lacking(columns, values, read, self.source)

    def _row(self, values: dict[str, Any], unchanged: frozenset[str], *, gone: bool = False) -> Any:
        if self._model is None:
            return PlainRow(values, self.table, unchanged, gone=gone)
        return read_row(row_model(self._model), values, unchanged, gone=gone)
