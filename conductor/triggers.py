"""Why a task runs: `OnChange`, as a type checker sees it; what it does is `ChangeTrigger`'s.

Its overloads say for each set of operations which events they give, so that a handler takes no
others and ``match`` narrows to the row's type. Pure.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeAlias, overload

from pydantic import JsonValue
from typing_extensions import TypeVar, Unpack

from conductor.arguments import declares
from conductor.change_options import (
    DeleteOptions,
    GroupOptions,
    GroupUpdateOptions,
    InsertOptions,
    UpdateOptions,
)
from conductor.change_triggers import ChangeTrigger
from conductor.columns import Columns
from conductor.events import Delete, Insert, Transaction, Truncate, Update
from conductor.matching import Group, Operation
from conductor.plain_triggers import Cron, Invocable, OnEvent
from conductor.rows import ModelT

__all__ = ["Cron", "Invocable", "OnChange", "OnEvent"]

E_co = TypeVar("E_co", covariant=True, default=Any)
Plain: TypeAlias = dict[str, JsonValue]

_InsertUpdate: TypeAlias = Literal["insert", "update"]
_InsertDelete: TypeAlias = Literal["insert", "delete"]
_UpdateDelete: TypeAlias = Literal["update", "delete"]
_OnRows: TypeAlias = Literal["insert", "update", "delete"]


class OnChange(ChangeTrigger[E_co], Generic[E_co]):
    """The task runs for committed changes of a table, read from the WAL.

    ``row`` is a row model, or ``schema.table`` for plain dictionaries. Without operations:
    insert, update and delete. ``columns`` narrows what is carried (by default the model's columns);
    ``changed`` keeps only updates in which one of these differs, and needs REPLICA IDENTITY FULL.
    ``when`` keeps only changes for which a CEL expression is true, see `conductor.filters`.
    ``group="transaction"`` makes one job of what a transaction changed, see `Transaction`.
    ``source`` names the database that the table is in (by default that of the model's `Database`).
    ``coalesce_s``: changes of a row that come within so many seconds after a first one become one
    job, of the latest row. ``key``: the columns whose values are the key of what coalesces, or of
    an ordered task's jobs; by default those of the row's own, its replica identity.

    With ``refetch`` a run reads what `new` lacks of the model, by the row's key, from the table as
    it is then: columns that are not captured, and large (TOASTed) values that an update did not
    touch. ``event.refetched`` says so; ``event.gone`` that the row was not there any more. A later
    run of the same job may see other values.

    Raises UnknownColumn for a column the model does not have, and FilterInvalid.

        OnChange(Users, "insert", "update", columns=lambda u: (u.id, u.email))
        OnChange(Users, "insert", when='new.email.endsWith("@example.com")')
    """

    @overload
    def __init__(
        self: OnChange[Insert[ModelT] | Update[ModelT] | Delete[ModelT]],
        row: type[ModelT],
        /,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[ModelT]],
        row: type[ModelT],
        operation: Literal["insert"],
        /,
        **options: Unpack[InsertOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Update[ModelT]],
        row: type[ModelT],
        operation: Literal["update"],
        /,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Delete[ModelT]],
        row: type[ModelT],
        operation: Literal["delete"],
        /,
        **options: Unpack[DeleteOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Truncate[ModelT]],
        row: type[ModelT],
        operation: Literal["truncate"],
        /,
        *,
        source: str = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[ModelT] | Update[ModelT]],
        row: type[ModelT],
        first: _InsertUpdate,
        second: _InsertUpdate,
        /,
        *more: _InsertUpdate,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[ModelT] | Delete[ModelT]],
        row: type[ModelT],
        first: _InsertDelete,
        second: _InsertDelete,
        /,
        *more: _InsertDelete,
        **options: Unpack[InsertOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Update[ModelT] | Delete[ModelT]],
        row: type[ModelT],
        first: _UpdateDelete,
        second: _UpdateDelete,
        /,
        *more: _UpdateDelete,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[ModelT] | Update[ModelT] | Delete[ModelT]],
        row: type[ModelT],
        first: _OnRows,
        second: _OnRows,
        /,
        *more: _OnRows,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[ModelT] | Update[ModelT] | Delete[ModelT] | Truncate[ModelT]],
        row: type[ModelT],
        first: Operation,
        second: Operation,
        /,
        *more: Operation,
        **options: Unpack[UpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain] | Update[Plain] | Delete[Plain]],
        row: str,
        /,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain]],
        row: str,
        operation: Literal["insert"],
        /,
        **options: Unpack[InsertOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Update[Plain]],
        row: str,
        operation: Literal["update"],
        /,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Delete[Plain]],
        row: str,
        operation: Literal["delete"],
        /,
        **options: Unpack[DeleteOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Truncate[Plain]],
        row: str,
        operation: Literal["truncate"],
        /,
        *,
        source: str = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain] | Update[Plain]],
        row: str,
        first: _InsertUpdate,
        second: _InsertUpdate,
        /,
        *more: _InsertUpdate,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain] | Delete[Plain]],
        row: str,
        first: _InsertDelete,
        second: _InsertDelete,
        /,
        *more: _InsertDelete,
        **options: Unpack[InsertOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Update[Plain] | Delete[Plain]],
        row: str,
        first: _UpdateDelete,
        second: _UpdateDelete,
        /,
        *more: _UpdateDelete,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain] | Update[Plain] | Delete[Plain]],
        row: str,
        first: _OnRows,
        second: _OnRows,
        /,
        *more: _OnRows,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Insert[Plain] | Update[Plain] | Delete[Plain] | Truncate[Plain]],
        row: str,
        first: Operation,
        second: Operation,
        /,
        *more: Operation,
        **options: Unpack[UpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[ModelT] | Update[ModelT] | Delete[ModelT]]],
        row: type[ModelT],
        /,
        *,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[ModelT]]],
        row: type[ModelT],
        operation: Literal["insert"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Update[ModelT]]],
        row: type[ModelT],
        operation: Literal["update"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Delete[ModelT]]],
        row: type[ModelT],
        operation: Literal["delete"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[ModelT] | Update[ModelT]]],
        row: type[ModelT],
        first: _InsertUpdate,
        second: _InsertUpdate,
        /,
        *more: _InsertUpdate,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[ModelT] | Delete[ModelT]]],
        row: type[ModelT],
        first: _InsertDelete,
        second: _InsertDelete,
        /,
        *more: _InsertDelete,
        group: Group,
        **options: Unpack[GroupOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Update[ModelT] | Delete[ModelT]]],
        row: type[ModelT],
        first: _UpdateDelete,
        second: _UpdateDelete,
        /,
        *more: _UpdateDelete,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[ModelT] | Update[ModelT] | Delete[ModelT]]],
        row: type[ModelT],
        first: _OnRows,
        second: _OnRows,
        /,
        *more: _OnRows,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[
            Transaction[Insert[ModelT] | Update[ModelT] | Delete[ModelT] | Truncate[ModelT]]
        ],
        row: type[ModelT],
        first: Operation,
        second: Operation,
        /,
        *more: Operation,
        group: Group,
        **options: Unpack[GroupUpdateOptions[ModelT]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[Plain] | Update[Plain] | Delete[Plain]]],
        row: str,
        /,
        *,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[Plain]]],
        row: str,
        operation: Literal["insert"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Update[Plain]]],
        row: str,
        operation: Literal["update"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Delete[Plain]]],
        row: str,
        operation: Literal["delete"],
        /,
        *,
        group: Group,
        **options: Unpack[GroupOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[Plain] | Update[Plain]]],
        row: str,
        first: _InsertUpdate,
        second: _InsertUpdate,
        /,
        *more: _InsertUpdate,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[Plain] | Delete[Plain]]],
        row: str,
        first: _InsertDelete,
        second: _InsertDelete,
        /,
        *more: _InsertDelete,
        group: Group,
        **options: Unpack[GroupOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Update[Plain] | Delete[Plain]]],
        row: str,
        first: _UpdateDelete,
        second: _UpdateDelete,
        /,
        *more: _UpdateDelete,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[Transaction[Insert[Plain] | Update[Plain] | Delete[Plain]]],
        row: str,
        first: _OnRows,
        second: _OnRows,
        /,
        *more: _OnRows,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @overload
    def __init__(
        self: OnChange[
            Transaction[Insert[Plain] | Update[Plain] | Delete[Plain] | Truncate[Plain]]
        ],
        row: str,
        first: Operation,
        second: Operation,
        /,
        *more: Operation,
        group: Group,
        **options: Unpack[GroupUpdateOptions[Plain]],
    ) -> None: ...
    @declares
    def __init__(
        self,
        row: type[Any] | str,
        /,
        *operations: Operation,
        columns: Columns[Any] | None = None,
        changed: Columns[Any] | None = None,
        when: str | None = None,
        refetch: bool = False,
        group: Group | None = None,
        source: str | None = None,
        key: Columns[Any] | None = None,
        coalesce_s: float | None = None,
    ) -> None:
        super().__init__(
            row,
            operations,
            columns=columns,
            changed=changed,
            when=when,
            refetch=refetch,
            group=group,
            source=source,
            key=key,
            coalesce_s=coalesce_s,
        )
