from __future__ import annotations

from pathlib import Path

import pytest

from conductor.config import load
from conductor.errors import ConfigError

DSN = "postgresql://app:s3cret@db:5432/shop"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSN", "CONFIG", "SECRETS_DIR", "METRICS_PORT", "SLOTS", "LOG_LEVEL"):
        monkeypatch.delenv(f"CONDUCTOR_{name}", raising=False)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", DSN)
    monkeypatch.setenv("CONDUCTOR_METRICS_PORT", "9464")
    settings = load()
    assert settings.conninfo == DSN
    assert settings.metrics_port == 9464
    assert settings.slots is None


def test_the_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", DSN)
    settings = load()
    assert "s3cret" not in f"{settings} {settings!r} {settings.model_dump()}"


def test_options_come_before_environment_before_secrets_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "conductor.toml"
    file.write_text('dsn = "host=file"\nslots = 1\nmetrics_port = 1\nlog_level = "error"\n')
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "conductor_dsn").write_text("host=secret\n")
    (secrets / "conductor_slots").write_text("2")
    monkeypatch.setenv("CONDUCTOR_CONFIG", str(file))
    monkeypatch.setenv("CONDUCTOR_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("CONDUCTOR_SLOTS", "3")
    settings = load(metrics_port=4, slots=None)
    assert settings.conninfo == "host=secret"
    assert (settings.slots, settings.metrics_port, settings.log_level) == (3, 4, "error")


def test_no_dsn_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="CONDUCTOR_DSN: is not set"):
        _ = load().conninfo


def test_wrong_settings_are_named_in_one_line_without_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", "postgres//app:s3cret@db")
    monkeypatch.setenv("CONDUCTOR_SLOTS", "many")
    with pytest.raises(ConfigError) as refused:
        load()
    message = str(refused.value)
    assert message.startswith("CONDUCTOR_DSN: is no connection string such as postgresql://")
    assert "CONDUCTOR_SLOTS: Input should be a valid integer" in message
    assert "s3cret" not in message
    assert "many" not in message
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("name", ["CONDUCTOR_CONFIG", "CONDUCTOR_SECRETS_DIR"])
def test_a_path_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=f"{name}: there is no"):
        load()


@pytest.mark.parametrize(
    "text, message",
    [
        ("slots = ", "CONDUCTOR_CONFIG: "),
        ("slotz = 3", "^CONDUCTOR_CONFIG: unknown setting 'slotz', did you mean 'slots'"),
        ('CONDUCTOR_DSN = "x"', "unknown setting 'CONDUCTOR_DSN', did you mean 'dsn'"),
        ("zzz = 3", "^CONDUCTOR_CONFIG: unknown setting 'zzz'$"),
        ("[sources]\nbilling = 'x'\n[colour]\nred = 1", "unknown setting 'colour'"),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "conductor.toml"
    file.write_text(text)
    monkeypatch.setenv("CONDUCTOR_CONFIG", str(file))
    with pytest.raises(ConfigError, match=message):
        load()


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDUCTOR_CONFIG", "/proc/self/mem")  # whoever asks, root as well
    with pytest.raises(ConfigError, match=r"^CONDUCTOR_CONFIG: cannot read /proc/self/mem: Input"):
        load()


@pytest.mark.parametrize("dsn", ["postgresql://u:s3@cret@127.0.0.1/db", "postgresql://u:s3/cret@h"])
def test_a_password_that_is_read_as_a_host_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", dsn)
    with pytest.raises(ConfigError, match="is no connection string") as refused:
        load()
    assert "cret" not in str(refused.value)


def test_sources_that_are_not_json_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDUCTOR_SOURCES", '{"billing": "postgresql://u:s3cret@db/x"')
    with pytest.raises(ConfigError, match="CONDUCTOR_SOURCES: it is not JSON") as refused:
        load()
    assert "s3cret" not in str(refused.value)


def test_a_secret_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conductor_dsn").write_bytes(b"\xffs3cret")
    monkeypatch.setenv("CONDUCTOR_SECRETS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="CONDUCTOR_DSN: it is not UTF-8") as refused:
        load()
    assert "s3cret" not in str(refused.value)
