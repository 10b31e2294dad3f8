"""Server settings from flags, `SOFTLABELS_…` environment variables and a TOML file, in this order of precedence."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from softlabels.errors import RequestError

ENV_PREFIX = "SOFTLABELS_"

MAX_WORKERS = 256
"""More than the cores of any machine that this was tested on: a larger number is a typing error."""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
WholeSeconds: TypeAlias = Annotated[int, Field(gt=0)]
Count: TypeAlias = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """All settings of a server. Field names are TOML keys; docs/http.md has the table.

    Values given to the constructor (the flags of `softlabels serve`) win over variables such as `SOFTLABELS_PORT`,
    those over the file that `config` or `SOFTLABELS_CONFIG` names, and the file over the defaults.

    Raises:
        RequestError: a value is not allowed; the message names its field, variable or file.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    config: Path | None = Field(default=None, description="TOML file with settings")
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on: 127.0.0.1 serves this machine alone, 0.0.0.0 everyone who can reach it",
    )
    port: int = Field(default=8000, ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    token: str | None = Field(
        default=None,
        repr=False,
        description="bearer token that requests must carry, except to /health; not a flag, since every user of a "
        "machine can see the arguments of its processes",
    )
    token_file: Path | None = Field(default=None, description="file whose first line is the bearer token")
    # A sampler's batch is hundreds of ids, a whole validation set tens of thousands.
    max_batch_ids: Count = Field(default=65_536, description="maximum number of ids in a batch")
    max_reply_bytes: Count = Field(
        default=256 << 20, description="maximum size of a reply's arrays, which are held in memory until they are sent"
    )
    # 65,536 string ids of 250 bytes as JSON.
    max_body_bytes: Count = Field(default=16 << 20, description="maximum size of a request's body")
    header_timeout_s: Seconds = Field(default=10.0, description="time for a client to send a request's header")
    body_timeout_s: Seconds = Field(default=30.0, description="time for a client to send a request's body")
    # Longer than a training step with its validation, or every batch would need a new connection.
    keep_alive_timeout_s: WholeSeconds = Field(
        default=75, description="how long a connection may be idle between requests"
    )
    # A trainer may validate for minutes; one that comes back later reconnects without losing a row.
    stall_timeout_s: Seconds = Field(
        default=600.0, description="how long the reader of an epoch stream may stall; it can resume at its cursor"
    )
    shutdown_timeout_s: WholeSeconds = Field(
        default=5, description="time for replies under way once the server is told to stop"
    )
    # On 2 cores a second worker adds little, since the clients need CPU too: docs/operations.md has the figures.
    workers: int = Field(
        default=1, ge=1, le=MAX_WORKERS, description="number of processes that answer; each opens the stores itself"
    )
    scrub: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,5}[smhd]$",
        description="compare every file of the served stores with what was written, once in this time: 24h for once a "
        "day, also with s, m or d; damaged shards are refused",
    )
    access_log: bool = Field(default=False, description="log a line for each request")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RequestError("; ".join(_explain(fault, values) for fault in error.errors())) from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values, highest precedence first."""
        # The file's name is itself a setting, and has to be known before the sources are listed.
        file = init_settings().get("config") or os.environ.get(ENV_PREFIX + "CONFIG")
        return (init_settings, env_settings) if file is None else (init_settings, env_settings, _toml(cls, Path(file)))

    @model_validator(mode="before")
    @classmethod
    def _read_token(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("token_file") is not None:
            if values.get("token") is not None:
                raise ValueError("token and token_file are both set: set one")
            values = {**values, "token": _first_line(Path(values["token_file"]))}
        token = values.get("token")
        if isinstance(token, str) and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError("the token must be printable ASCII and not empty: it travels in a header")
        return values

    @property
    def scrub_interval_s(self) -> float | None:
        """`scrub` in seconds."""
        return None if self.scrub is None else float(self.scrub[:-1]) * _UNITS_S[self.scrub[-1]]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def flag_of(name: str) -> str:
    """Return the flag of `softlabels serve` for a setting, for example `--stall-timeout` for `stall_timeout_s`."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def _toml(kind: type[Settings], file: Path) -> TomlConfigSettingsSource:
    try:
        file.stat()  # pydantic-settings treats a missing file as empty, which would hide a misspelled name
        return TomlConfigSettingsSource(kind, toml_file=file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"the settings file {str(file)!r} cannot be read: {error}") from error


def _first_line(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the token file cannot be read: {error}") from error
    if not lines or not lines[0].strip():
        raise RequestError(f"the first line of {file} is empty: it must be the token, a long random text")
    return lines[0].strip()


def _explain(fault: Any, values: dict[str, Any]) -> str:
    """Return a validation error as a message that names the setting where its value came from."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    name = str(fault["loc"][0])
    variable = ENV_PREFIX + name.upper()
    where = name if name in values else variable if variable in os.environ else f"{name} in the settings file"
    if fault["type"] == "extra_forbidden":
        return f"{where} is not a setting; known are {', '.join(Settings.model_fields)}"
    # A message must not repeat the token.
    found = "refused" if name == "token" else repr(fault["input"])
    return f"{where} is {found}: {message[0].lower()}{message[1:]}"
