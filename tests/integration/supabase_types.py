"""What `supabase gen types --lang=python` prints for the tables of `test_supabase`: its shapes.

Kept as it comes, with its defects: no class names its table, arrays of enums and bytea have the
types of another interface, and a type that the generator does not know is an undefined name.
"""
# mypy: ignore-errors
# ruff: noqa: F821, ICN001, UP006, UP035, UP045 - it is what it is

from __future__ import annotations

import datetime
from typing import (
    Annotated,
    Any,
    List,
    Literal,
    NotRequired,
    Optional,
    TypeAlias,
    TypedDict,
)

from pydantic import BaseModel, Field, Json, JsonValue

PublicMood: TypeAlias = Literal["sad", "so so"]


class PublicMovies(BaseModel):
    cover: Optional[bytes] = Field(alias="cover")
    data: Optional[JsonValue] = Field(alias="data")
    id: int = Field(alias="id")
    moods: Optional[List[PublicMood]] = Field(alias="moods")
    odd_name: Optional[str] = Field(alias="Odd name")
    old_data: Optional[Json[Any]] = Field(alias="old_data")
    pair: Optional[PublicPair] = Field(alias="pair")
    price: Optional[float] = Field(alias="price")
    scene: Optional[list[Any]] = Field(alias="scene")
    shown_at: Optional[datetime.datetime] = Field(alias="shown_at")
    size: Optional[int] = Field(alias="size")


class PublicMoviesInsert(TypedDict):
    id: Annotated[int, Field(alias="id")]
    odd_name: NotRequired[Annotated[Optional[str], Field(alias="Odd name")]]


class PublicMoviesUpdate(TypedDict):
    id: NotRequired[Annotated[int, Field(alias="id")]]
    odd_name: NotRequired[Annotated[Optional[str], Field(alias="Odd name")]]


class PublicHosts(BaseModel):
    id: int = Field(alias="id")
    ip: Optional[PgCatalogInet] = Field(alias="Ip address")


class PublicVictoryRoad(BaseModel):
    id: int = Field(alias="id")


class PublicTwice(BaseModel):
    id: int = Field(alias="id")


class PublicGone(BaseModel):
    id: int = Field(alias="id")


class PublicPair(BaseModel):
    a: int = Field(alias="a")
    b: Json[Any] = Field(alias="b")


class PublicCheap(BaseModel):
    id: Optional[int] = Field(alias="id")
