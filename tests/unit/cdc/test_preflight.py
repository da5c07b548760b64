"""What a source server must have."""

from dataclasses import replace

from cdc.catalog import Server
from cdc.errors import ConfigError, PluginRefused, PrivilegeMissing, WalLevelTooLow
from cdc.preflight import limits_of, refuse_server, warn_of_release

SERVER = Server(
    version_number=150018,
    version="15.18",
    wal_level="logical",
    max_replication_slots=10,
    used_replication_slots=0,
    max_wal_senders=10,
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
