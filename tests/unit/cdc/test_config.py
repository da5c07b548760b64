"""Where settings come from, in which order, and what a wrong one says."""

import json
from pathlib import Path

import pytest

from cdc.config import load
from cdc.errors import ConfigError

DSN = "postgresql://cdc:hunter2@db:5432/shop"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the source is set."""
    for name in ("CDC_QUEUE_DSN", "CDC_SLOT", "CDC_CONFIG", "CDC_SECRETS_DIR", "CDC_METRICS_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CDC_SOURCE_DSN", DSN)


def test_defaults() -> None:
    settings = load()
    assert settings.queue_conninfo == settings.source_conninfo == DSN
    assert (settings.slot, settings.publication, settings.plugin) == (
        "conductor",
        "conductor",
        "pgoutput",
    )
    assert settings.gap_policy == "stop"


def test_the_nearer_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = tmp_path / "cdc.toml"
    toml.write_text('slot = "of_toml"\npublication = "of_toml"\nsource = "of_toml"\n')
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "cdc_queue_dsn").write_text("postgresql://queue@db/shop\n")
    (secrets / "cdc_publication").write_text("of_secret")
    monkeypatch.setenv("CDC_CONFIG", str(toml))
    monkeypatch.setenv("CDC_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("CDC_PUBLICATION", "of_environment")
    settings = load(slot="of_command_line", publication=None)
    assert settings.slot == "of_command_line"
    assert settings.publication == "of_environment"
    assert settings.source == "of_toml"
    assert settings.queue_conninfo == "postgresql://queue@db/shop"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_QUEUE_DSN", "")
    monkeypatch.setenv("CDC_SLOT", "")
    assert load().slot == "conductor"


def test_a_password_is_never_shown() -> None:
    settings = load(queue_dsn=DSN)
    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump()}"


def test_every_wrong_setting_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_SLOT", "Not A Slot")
    monkeypatch.setenv("CDC_METRICS_PORT", "many")
    monkeypatch.setenv("CDC_SOURCE_DSN", "postgresql://cdc:hunter2/5@db/shop")
    with pytest.raises(ConfigError) as caught:
        load()
    text = str(caught.value)
    assert all(name in text for name in ("CDC_SLOT", "CDC_METRICS_PORT", "CDC_SOURCE_DSN"))
    assert "hunter2" not in text
    assert "\n" not in text
    assert caught.value.exit_code == 78


def test_a_missing_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDC_SOURCE_DSN")
    with pytest.raises(ConfigError, match="CDC_SOURCE_DSN: is not set"):
        load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("slot = ", "CDC_CONFIG"),
        ('slott = "x"', "^CDC_CONFIG: unknown setting 'slott', did you mean 'slot'"),
        ('CDC_PUBLICATION = "x"', "'CDC_PUBLICATION', did you mean 'publication' or"),
        ("zzz = 3", "^CDC_CONFIG: unknown setting 'zzz'$"),
        (None, "there is no file"),
    ],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, words: str
) -> None:
    path = tmp_path / "cdc.toml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("CDC_CONFIG", str(path))
    with pytest.raises(ConfigError, match=words):
        load()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("COLUMN_LISTS", '{"public.users": []}', r"CDC_COLUMN_LISTS\[public.users\]: no column"),
        ("COLUMN_LISTS", '{"users": ["id"]}', r"CDC_COLUMN_LISTS\[users\]: a table is named with"),
        ("COLUMN_LISTS", "users", "CDC_COLUMN_LISTS: it is not JSON"),
        ("ROW_FILTERS", '{"public.users": " "}', r"CDC_ROW_FILTERS\[public.users\]: .* is empty"),
    ],
)
def test_what_would_leave_out_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """A table published whole, and yet not as the setting says, was published anew at each look."""
    monkeypatch.setenv(f"CDC_{name}", value)
    with pytest.raises(ConfigError, match=words):
        load()


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_CONFIG", "/proc/self/mem")  # whoever asks, root as well
    with pytest.raises(ConfigError, match=r"^CDC_CONFIG: cannot read /proc/self/mem: Input/output"):
        load()


def test_a_missing_folder_of_secrets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_SECRETS_DIR", "/nonesuch")
    with pytest.raises(ConfigError, match="there is no folder"):
        load()


def test_a_secret_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cdc_source_dsn").write_bytes(b"\xffhunter2")
    monkeypatch.delenv("CDC_SOURCE_DSN")
    monkeypatch.setenv("CDC_SECRETS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="CDC_SOURCE_DSN: it is not UTF-8") as caught:
        load()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "condition",
    [
        "level >= 40",
        "(level > 1 or note = ')') and name <> 'it''s; -- x'",
        '"odd;(" is null',
        r"note ~ '\d+' and note <> E'a\'b'",
        "level > 1 and e = 'x'",
    ],
)
def test_a_condition_is_one_expression(monkeypatch: pytest.MonkeyPatch, condition: str) -> None:
    monkeypatch.setenv("CDC_ROW_FILTERS", json.dumps({"public.t": condition}))
    assert load().row_filters == {"public.t": condition}


@pytest.mark.parametrize(
    "condition",
    [
        "true); drop table t; select (1",
        "true; select 1",
        "true) or (false",
        "(true",
        "true -- for now",
        "true /* for now",
        "note = 'x",
        'note = "x',
        r"note = E'\'' ; drop table t; --'",
        r"note = e'\\'';drop table t;select ''",
        "note = $$'$$; drop table t; --'",
        "note = $a$ ' $a$ ) ; select ('",
    ],
)
def test_what_would_go_beyond_its_condition_is_refused(
    monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    """A file of settings may be written by who may not write to the database."""
    monkeypatch.setenv("CDC_ROW_FILTERS", json.dumps({"public.t": condition}))
    with pytest.raises(ConfigError, match="one SQL expression"):
        load()
