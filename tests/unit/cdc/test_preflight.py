"""What a source server must have."""

from dataclasses import replace

from cdc.catalog import Server
from cdc.errors import (
    ConfigError,
    PluginRefused,
    PrivilegeMissing,
    WalLevelTooLow,
    WalUnlimited,
)
from cdc.preflight import (
    can_fail_over,
    limits_of,
    refuse_server,
    refuse_unlimited_wal,
    warn_of_failover,
    warn_of_release,
)

SERVER = Server(
    version_number=150018,
    version="15.18",
    wal_level="logical",
    max_replication_slots=10,
    used_replication_slots=0,
    max_slot_wal_keep_bytes=-1,
    synchronized_standby_slots=None,
    in_recovery=False,
    database="shop",
    encoding="UTF8",
    role="cdc",
    is_superuser=False,
    can_replicate=True,
    can_create=True,
)


def test_refuses_by_name() -> None:
    assert refuse_server(SERVER, "pgoutput") is None
    assert isinstance(
        refuse_server(replace(SERVER, version_number=140009), "pgoutput"), ConfigError
    )
    assert isinstance(
        refuse_server(replace(SERVER, wal_level="replica"), "pgoutput"), WalLevelTooLow
    )
    refusal = refuse_server(replace(SERVER, can_replicate=False), "pgoutput")
    assert isinstance(refusal, PrivilegeMissing)
    assert refusal.hint == 'alter role "cdc" replication'


def test_refuses_a_plugin_that_the_server_does_not_allow() -> None:
    listed = replace(SERVER, output_plugin_libraries='pgoutput, "test_decoding"')
    assert refuse_server(listed, "pgoutput") is None
    assert isinstance(refuse_server(listed, "wal2json"), PluginRefused)
    allowed = replace(SERVER, output_plugin_libraries="pgoutput, wal2json")
    assert refuse_server(allowed, "wal2json") is None
    assert refuse_server(SERVER, "wal2json") is None  # no such setting, or hidden from the role


def test_names_the_limits_of_a_plugin() -> None:
    assert limits_of("pgoutput") == []
    assert any("NaN" in limit for limit in limits_of("wal2json"))
    assert not any("NaN" in limit for limit in limits_of("wal2json", numbers_as_text=True))


def test_warns_of_releases_that_lose_rows() -> None:
    assert warn_of_release(SERVER) is None
    assert warn_of_release(replace(SERVER, version_number=180000)) is None
    for number in (150012, 160008, 170004):
        assert warn_of_release(replace(SERVER, version_number=number)) is not None


def test_wal_without_a_limit_is_refused_unless_allowed() -> None:
    refusal = refuse_unlimited_wal(SERVER, allowed=False)
    assert isinstance(refusal, WalUnlimited)
    assert "CDC_ALLOW_UNLIMITED_WAL" in refusal.hint
    assert refuse_unlimited_wal(SERVER, allowed=True) is None
    limited = replace(SERVER, max_slot_wal_keep_bytes=1 << 30)
    assert refuse_unlimited_wal(limited, allowed=False) is None


def test_a_slot_fails_over_from_17_on_a_primary() -> None:
    newer = replace(SERVER, version_number=170000)
    assert can_fail_over(newer)
    assert not can_fail_over(replace(SERVER, version_number=160009))
    assert not can_fail_over(replace(newer, in_recovery=True))


def test_what_a_failover_costs_is_told_where_there_is_a_standby() -> None:
    def words(server: Server, *, same_queue: bool = True) -> list[str]:
        return [fix.split()[-1] for _, fix in warn_of_failover(server, same_queue=same_queue)]

    assert words(SERVER) == []
    standby = replace(SERVER, physical_slots=1)
    assert len(words(standby)) == 2
    assert words(standby, same_queue=False) == ["there"]
    waited_for = replace(standby, synchronized_standby_slots="standby")
    assert words(waited_for) == ["elsewhere"]
    assert words(replace(waited_for, synchronous_standby_names="standby")) == []
