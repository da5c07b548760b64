import json

import pytest

from cdc.errors import ProtocolError, RelationUnknown
from cdc.relations import RelationCache, describe_shape, read_shape
from cdc.wire.messages import Column, Relation, Type

MOOD = 70000


def relation(*columns: tuple[str, int], oid: int = 1, schema: str = "shop") -> Relation:
    described = tuple(Column(name, t, -1, is_key=name == "id") for name, t in columns)
    return Relation(oid, schema, "users", "d", described)


def test_a_shape_has_what_rows_need() -> None:
    cache = RelationCache()
    cache.apply(relation(("email", 25), ("id", 20)))
    shape = cache.get(1)
    assert (shape.oid, shape.schema, shape.name, shape.replica_identity) == (
        1,
        "shop",
        "users",
        "d",
    )
    assert shape.column_names == ("email", "id")
    assert shape.type_oids == (25, 20)
    assert shape.key_indexes == (1,)
    assert shape.fragments([b"a", b"1"]) == [b'"a"', b"1"]
    assert [convert(b"1") for convert in shape.converters] == [b'"1"', b"1"]


def test_an_empty_schema_is_pg_catalog() -> None:
    cache = RelationCache()
    cache.apply(relation(schema=""))
    assert cache.get(1).schema == "pg_catalog"


def test_unknown_relations_have_an_error_of_their_own() -> None:
    with pytest.raises(RelationUnknown, match="OID 7") as raised:
        RelationCache().get(7)
    assert raised.value.relation_oid == 7
    assert isinstance(raised.value, ProtocolError)


def test_a_repeated_relation_keeps_its_shape() -> None:
    cache = RelationCache()
    cache.apply(relation(("id", 20)))
    shape = cache.get(1)
    cache.apply(relation(("id", 20)))
    assert cache.get(1) is shape
    assert cache.revision == shape.revision == 1


def test_a_changed_relation_has_a_new_shape_and_revision() -> None:
    cache = RelationCache()
    cache.apply(relation(("id", 20)))
    cache.apply(relation(("id", 20), oid=2))
    cache.apply(relation(("id", 20), ("email", 25)))
    assert cache.get(1).column_names == ("id", "email")
    assert [cache.get(1).revision, cache.get(2).revision, cache.revision] == [3, 2, 3]


def test_a_type_that_became_another_changes_the_shape() -> None:
    cache = RelationCache()
    cache.apply(Type(MOOD, "shop", "mood"))
    cache.apply(relation(("mood", MOOD)))
    assert cache.get(1).fragments([b"1"]) == [b'"1"']
    cache.apply(Type(MOOD, "", "int4"))
    cache.apply(relation(("mood", MOOD)))
    assert cache.get(1).fragments([b"1"]) == [b"1"]
    assert cache.revision == 2


def test_a_described_shape_is_read_back() -> None:
    cache = RelationCache()
    cache.apply(Type(MOOD, "", "int4"))
    cache.apply(relation(("id", 20), ("mood", MOOD), ("seen", MOOD + 1)))
    shape = cache.get(1)
    description = json.loads(json.dumps(describe_shape(shape)))
    again = read_shape(description)
    assert again.fragments([b"1", b"2", b"3"]) == [b"1", b"2", b'"3"']
    same = ("oid", "schema", "name", "replica_identity", "column_names", "type_oids", "key_indexes")
    for name in (*same, "types", "converters"):
        assert getattr(again, name) == getattr(shape, name)
    with pytest.raises(RelationUnknown, match="OID 1"):
        read_shape({"oid": 1})
