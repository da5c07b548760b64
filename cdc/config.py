"""The settings of a sidecar: command line, environment, secret files, TOML file, defaults.

In that order of precedence. `load` is the only way in and raises `ConfigError` in one line that
names every wrong setting; no message holds a connection string.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from cdc.catalog import TableName
from cdc.connection import parse_dsn
from cdc.errors import ConfigError
from cdc.narrowing import Narrowing

PREFIX: Final = "CDC_"
CONFIG_VARIABLE: Final = "CDC_CONFIG"
SECRETS_VARIABLE: Final = "CDC_SECRETS_DIR"

_QUOTED: Final = re.compile(
    r"""(?<!\w)[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*\"""", re.DOTALL
)
"""Strings and names in SQL; those between dollars are not read."""

SlotName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")]


def _check_table(value: str) -> str:
    schema, _, name = value.partition(".")
    if not schema or not name:
        raise ValueError("a table is named with its schema, as in public.users")
    return value


def _check_columns(value: list[str]) -> list[str]:
    if not value:
        raise ValueError("no column is listed; leave the table out to send it whole")
    return value


def _check_condition(value: str) -> str:
    if not value.strip():
        raise ValueError("the condition is empty; leave the table out to send every row")
    if not _is_one_expression(value):
        raise ValueError(
            "the condition is to be one SQL expression: every bracket and quote closed, "
            "no semicolon, no comment"
        )
    return value


def _is_one_expression(condition: str) -> bool:
    """Tell whether SQL in brackets stays there: nothing in it can end them, or the statement."""
    rest = _QUOTED.sub(" ", condition)
    depth = 0
    for bracket in re.findall(r"[()]", rest):
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return False
    return depth == 0 and not re.search(r"[;'\"\0]|--|/\*|\$\w*\$", rest)


TableKey = Annotated[str, AfterValidator(_check_table)]
Columns = Annotated[list[str], AfterValidator(_check_columns)]
Condition = Annotated[str, AfterValidator(_check_condition)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Every setting; the environment variable is the name in capitals after `CDC_`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    source_dsn: SecretStr
    """Where the changes come from."""

    queue_dsn: SecretStr = SecretStr("")
    """Where schema conductor lives; empty: in the source database."""

    admin_dsn: SecretStr = SecretStr("")
    """Whose rights `cdc apply` uses: the owner of tables and publication; empty: the source's."""

    slot: SlotName = "conductor"
    """The replication slot; it is also the leader lock. One per source and queue."""

    publication: Annotated[str, Field(min_length=1, max_length=63)] = "conductor"
    """The publication; made and kept by the sidecar unless CDC_MANAGE_PUBLICATION is off. A second
    one, named after it with `_inserts`, has the tables without a key."""

    source: Annotated[str, Field(min_length=1)] = "default"
    """The name under which subscriptions know this source."""

    plugin: Literal["pgoutput", "wal2json"] = "pgoutput"
    """What decodes the WAL on the server. Another plugin is another slot."""

    streaming: Literal["off", "on", "parallel"] = "off"
    """How large transactions come: off: whole, at their commit; on, parallel (PostgreSQL 16): in
    pieces while they run, kept by the sidecar instead of the server. For pgoutput only."""

    manage_publication: bool = True
    """Off: only look whether it is as it must be; `cdc plan` shows what is missing."""

    column_lists: dict[TableKey, Columns] = {}
    """Tables of which only these columns leave the database, as JSON:
    `{"public.users": ["id"]}`. In the application, DROP COLUMN of a listed one then fails."""

    row_filters: dict[TableKey, Condition] = {}
    """Tables of which only inserted rows leave the database for which this SQL is true, as JSON:
    `{"public.log_lines": "level >= 40"}`. Their updates and deletes cannot be captured."""

    allow_unlimited_wal: bool = False
    """On: run on a server without max_slot_wal_keep_size, whose disk an absent sidecar can fill."""

    failover: bool = True
    """The slot survives a failover to a standby that synchronises it (PostgreSQL 17 and later)."""

    gap_policy: Literal["stop", "recreate"] = "stop"
    """When changes may have been lost: end with status 65, or go on: with a new slot (what was
    committed before it gives no jobs), or without the one table that is gone. Both record a gap."""

    metrics_host: str = "0.0.0.0"  # noqa: S104  # scraped from outside the container
    """Where metrics and probes are served."""

    metrics_port: Annotated[int, Field(ge=-1, le=65535)] = 9465
    """-1: serve nothing; 0: any free port, named in the log."""

    status_interval_s: Seconds = 1.0
    """How often the server is told where we are, asked or not."""

    wal_sender_timeout_s: Annotated[float, Field(ge=5)] = 60.0
    """How long the server waits for a sign of life; a dead host is noticed after it."""

    slot_creation_deadline_s: Seconds = 60.0
    """Creating a slot waits for every running writer; after this, name them and give up."""

    give_up_after_s: Seconds = 60.0
    """Without a database for that long, end with status 69 (and let the supervisor decide)."""

    stop_timeout_s: Seconds = 4.0
    """After SIGTERM: how long finishing the batch in hand may take."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: for people on a terminal, JSON elsewhere."""

    @field_validator("source_dsn", "queue_dsn", "admin_dsn")
    @classmethod
    def _check_dsn(cls, value: SecretStr) -> SecretStr:
        try:
            parse_dsn(value.get_secret_value(), "it")
        except ConfigError as error:
            raise ValueError(f"{error}: {error.hint}") from None
        return value

    @property
    def narrowing(self) -> Narrowing:
        """What is left out of tables."""
        return Narrowing(
            {_table(name): tuple(columns) for name, columns in self.column_lists.items()},
            {_table(name): condition for name, condition in self.row_filters.items()},
        )

    @property
    def source_conninfo(self) -> str:
        """The source's connection string, password and all."""
        return self.source_dsn.get_secret_value()

    @property
    def queue_conninfo(self) -> str:
        """The queue's connection string, password and all."""
        return self.queue_dsn.get_secret_value() or self.source_conninfo

    @property
    def admin_conninfo(self) -> str:
        """The connection string of `cdc apply` for the source, password and all."""
        return self.admin_dsn.get_secret_value() or self.source_conninfo

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # the same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Add the TOML file, and secret files named as the variables (in small letters too)."""
        sources = [init_settings, env_settings]
        if folder := os.environ.get(SECRETS_VARIABLE):
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=folder))
        if path := os.environ.get(CONFIG_VARIABLE):
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=path))
        return tuple(sources)


def _table(key: str) -> TableName:
    schema, _, name = key.partition(".")
    return schema, name


def load(**overrides: Any) -> Settings:
    """Read the settings.

    Args:
        overrides: from the command line; None means not given.

    Raises:
        ConfigError: naming every setting that is wrong, by its variable.
    """
    if (path := os.environ.get(CONFIG_VARIABLE)) and not Path(path).is_file():
        raise ConfigError(f"{CONFIG_VARIABLE}: there is no file {path}")
    if (folder := os.environ.get(SECRETS_VARIABLE)) and not Path(folder).is_dir():
        raise ConfigError(f"{SECRETS_VARIABLE}: there is no folder {folder}")
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    except SettingsError as error:
        raise ConfigError(_describe_unread(error)) from None
    except ValueError as error:  # the TOML file cannot be parsed
        raise ConfigError(f"{CONFIG_VARIABLE}: {error}") from None
    except OSError as error:
        where = error.filename or path
        raise ConfigError(f"{CONFIG_VARIABLE}: cannot read {where}: {error.strerror}") from None


def _describe(error: ValidationError) -> str:
    """Name each wrong setting in one line, without its value: it may be a secret."""
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        setting, *place = (part for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            problems.append(_unknown(str(setting)))
            continue
        name = f"{PREFIX}{setting}".upper() + "".join(f"[{part}]" for part in place)
        message = "is not set" if problem["type"] == "missing" else problem["msg"]
        problems.append(f"{name}: {message.removeprefix('Value error, ')}")
    return "; ".join(problems)


def _unknown(key: str) -> str:
    """Name a key that only the TOML file can have, and the setting that was meant."""
    plain = key.lower().removeprefix(PREFIX.lower())
    near = get_close_matches(plain, Settings.model_fields, n=3, cutoff=0.5)
    meant = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{CONFIG_VARIABLE}: unknown setting {key!r}{meant}"


def _describe_unread(error: SettingsError) -> str:
    """Name the variable whose value cannot be read, by the only place where pydantic says so."""
    found = re.search(r'field "(\w+)"', str(error))
    name = PREFIX + found[1].upper() if found else "a setting"
    cause = error.__cause__
    if isinstance(cause, OSError):
        return f"{name}: its file cannot be read: {cause.strerror}"
    return f"{name}: it is not {'UTF-8' if isinstance(cause, UnicodeError) else 'JSON'}"
