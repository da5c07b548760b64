import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.servers import dsn_for, wait_until


def test_a_dsn_changes_only_what_is_asked() -> None:
    base = r"host=/tmp/s port=5433 user='o\'brien' password='a b@c/d' dbname=x sslmode=disable"
    changed = conninfo_to_dict(dsn_for(base, dbname="x y"))
    assert changed == {**conninfo_to_dict(base), "dbname": "x y"}


def test_a_dsn_without_a_user() -> None:
    assert conninfo_to_dict(dsn_for("dbname=a", user="b")) == {"dbname": "a", "user": "b"}
    assert conninfo_to_dict(dsn_for("dbname=a")) == {"dbname": "a"}


def test_waiting_ends_with_the_condition_or_the_time() -> None:
    answers = iter([False, True])
    wait_until(lambda: next(answers), 5, "two looks")
    with pytest.raises(TimeoutError, match="a look: not within"):
        wait_until(lambda: False, 0.01, "a look")
