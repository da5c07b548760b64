"""The settings of the command line: options, environment, secret files, TOML file, defaults.

In that order of precedence. `load` is the only way in; it raises ConfigError in one line that
names every wrong setting, and no message holds a connection string.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from conductor.dsn import parse_dsn
from conductor.errors import ConfigError, nearest

PREFIX: Final = "CONDUCTOR_"
CONFIG_VARIABLE: Final = "CONDUCTOR_CONFIG"
SECRETS_VARIABLE: Final = "CONDUCTOR_SECRETS_DIR"

_HINT: Final = (
    "Set the variable, a file in CONDUCTOR_SECRETS_DIR, or the TOML file CONDUCTOR_CONFIG."
)

Seconds = Annotated[float, Field(ge=0)]


class Settings(BaseSettings):
    """Every setting; the environment variable is the name in capitals after ``CONDUCTOR_``.

    What is None leaves to the orchestrator what the application said.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    dsn: SecretStr | None = None
    """The queue database."""

    listen_dsn: SecretStr | None = None
    """The same database past a pooler, for LISTEN; needed only when CONDUCTOR_DSN leads to one."""

    source_dsn: SecretStr | None = None
    """Where the tables are that triggers with refetch read and jobs wait for changes of, when that
    is not the queue database."""

    sources: dict[str, SecretStr] = Field(default_factory=dict)
    """The same of further sources, as JSON: {"billing": "postgresql://…"}."""

    metrics_port: Annotated[int, Field(ge=-1, le=65535)] | None = None
    """Where a worker serves metrics and probes. -1: nowhere; 0: any free port, named in the log."""

    metrics_host: str | None = None
    """The address for that."""

    slots: Annotated[int, Field(ge=1)] | None = None
    """How many jobs of a queue run at once in one process."""

    transactions: Annotated[int, Field(ge=1)] | None = None
    """How many `ctx.transaction` of a queue at once in one process; each holds a connection."""

    dead_after_s: Annotated[float, Field(ge=2)] | None = None
    """A worker whose lease stands still for so long is dead. The same in all processes."""

    drain_timeout_s: Seconds | None = None
    """After SIGTERM: how long running handlers may take before they are stopped."""

    wait_captured_s: Seconds | None = None
    """How long a worker's start waits until its change triggers are captured. None: not at all."""

    connect_timeout_s: Seconds = 30.0
    """Without a database for that long, end with status 69."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: for people on a terminal, JSON elsewhere."""

    @field_validator("dsn", "listen_dsn", "source_dsn")
    @classmethod
    def _check_dsn(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            if value is not None:
                parse_dsn(value.get_secret_value())
        except ConfigError:
            raise ValueError(
                "is no connection string such as postgresql://user@host:5432/database"
                " (special characters of a password as %XX)"
            ) from None
        return value

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for dsn in value.values():
            cls._check_dsn(dsn)
        return value

    @property
    def conninfo(self) -> str:
        """The connection string, password and all. Raises ConfigError when none is set."""
        if self.dsn is None:
            raise ConfigError(f"{PREFIX}DSN: is not set", hint=_HINT)
        return self.dsn.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Add secret files, named as the variables, and the TOML file."""
        sources = [init_settings, env_settings]
        if folder := os.environ.get(SECRETS_VARIABLE):
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=folder))
        if path := os.environ.get(CONFIG_VARIABLE):
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=path))
        return tuple(sources)


def load(**options: Any) -> Settings:
    """Read the settings; ``options`` are the command line's, None for one that was not given.

    Raises ConfigError, naming every setting that is wrong by its variable.
    """
    if (path := os.environ.get(CONFIG_VARIABLE)) and not Path(path).is_file():
        raise ConfigError(f"{CONFIG_VARIABLE}: there is no file {path}", hint=_HINT)
    if (folder := os.environ.get(SECRETS_VARIABLE)) and not Path(folder).is_dir():
        raise ConfigError(f"{SECRETS_VARIABLE}: there is no folder {folder}", hint=_HINT)
    try:
        return Settings(**{key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_describe(error), hint=_HINT) from None
    except SettingsError as error:
        raise ConfigError(_describe_unread(error), hint=_HINT) from None
    except ValueError as error:  # the TOML file cannot be parsed
        raise ConfigError(f"{CONFIG_VARIABLE}: {error}", hint=_HINT) from None
    except OSError as error:
        problem = f"cannot read {error.filename or path}: {error.strerror}"
        raise ConfigError(f"{CONFIG_VARIABLE}: {problem}", hint=_HINT) from None


def _describe(error: ValidationError) -> str:
    """Name each wrong setting in one line, without its value: it may be a secret."""
    problems = [
        _unknown(str(problem["loc"][0]))
        if problem["type"] == "extra_forbidden"
        else f"{PREFIX}{'_'.join(map(str, problem['loc'])).upper()}: "
        + problem["msg"].removeprefix("Value error, ")
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return "; ".join(dict.fromkeys(problems))


def _describe_unread(error: SettingsError) -> str:
    """Name the variable whose value cannot be read, by the only place where pydantic says so."""
    found = re.search(r'field "(\w+)"', str(error))
    name = PREFIX + found[1].upper() if found else "a setting"
    cause = error.__cause__
    if isinstance(cause, OSError):
        return f"{name}: its file cannot be read: {cause.strerror}"
    return f"{name}: it is not {'UTF-8' if isinstance(cause, UnicodeError) else 'JSON'}"


def _unknown(key: str) -> str:
    """Name a key that only the TOML file can have, and the setting that was meant."""
    near = nearest(key.lower().removeprefix(PREFIX.lower()), Settings.model_fields)
    meant = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{CONFIG_VARIABLE}: unknown setting {key!r}{meant}"
