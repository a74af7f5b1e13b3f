"""Every setting of the service, read from `QUOTES_*` variables and a `.env` file.

Invariant: nothing else in the project reads the environment, and reading settings has no side effect.
"""

import os
import re
from datetime import timedelta
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict

from app.errors import InvalidRequest

MIB = 1024 * 1024
DAY = timedelta(days=1)
#: Any that reaches before the first instant that can be stored keeps all, and so far back calendars of others end.
_LONGEST_RETENTION = timedelta(days=200 * 365)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|sec|second|min|minute|h|hour|d|day|w|week|month|y|year)s?")
_SECONDS = {
    "ms": 0.001, "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600,
    "d": 86400, "day": 86400, "w": 604800, "week": 604800, "month": 30 * 86400, "y": 365 * 86400, "year": 365 * 86400,
}  # fmt: skip


def _duration(value: object) -> object:
    """Read `30 days`, `500 ms`, `2 years`; leave ISO 8601 and the rest to pydantic."""
    if isinstance(value, str) and value.strip() == "0":
        return timedelta(0)
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip().lower())):
        try:
            return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
        except OverflowError:
            raise ValueError("is longer than any time") from None
    return value


def _retention(value: object) -> object:
    if isinstance(value, str) and value.strip().lower() in {"", "none"}:
        return None
    return _duration(value)


def span(text: str, name: str) -> timedelta | None:
    """The span that a text is, `none` being None; `name` is who gave it.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        value: timedelta | None = _SPAN.validate_python(text)
    except ValidationError:
        value = timedelta(0)
    absent = value is None and (text.strip() == "" or not name.endswith("retention"))
    if absent or (value is not None and value <= timedelta(0)):
        raise InvalidRequest(f"{name} is a time such as `30 days` or `2 years`.")
    return value


def fault_of(retention: timedelta | None, chunk_interval: timedelta, compress_after: timedelta) -> str | None:
    """Why these do not go together; None if they do."""
    if chunk_interval % DAY and (chunk_interval < timedelta(minutes=1) or DAY % chunk_interval):
        return "chunk_interval must be whole days, or an even part of one as 1 hour or 8 hours are"
    if compress_after < chunk_interval:
        return "compress_after must be at least chunk_interval"
    if retention is None:
        return None
    if retention > _LONGEST_RETENTION:
        return "retention must be at most 200 years; `none` keeps all quotes"
    if retention < 4 * max(chunk_interval, DAY):
        return "retention must span at least four days and four chunks (retention >= 4 x chunk_interval)"
    if compress_after >= retention:
        return "compress_after must be shorter than retention"
    return None


def url_fault(url: str) -> str | None:
    """Why a URL names no database, as the end of a sentence; None if it may.

    Nothing of the URL is in it: what stands in a wrong place may be a part of the password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return _NOT_ENCODED
    if parts.scheme not in {"postgresql", "postgres"}:
        return "must be a plain postgresql:// URL"
    auth, at, listed = parts.netloc.rpartition("@")
    elsewhere = parts.netloc and not at and "@" in parts.path + parts.query
    if "@" in auth or elsewhere or "#" in url or _PERCENT.search(url):
        return _NOT_ENCODED
    hosts = [_HOST.fullmatch(host) for host in listed.split(",")] if listed else []
    if None in hosts:
        return f"must name its hosts as host or host:port, and {_NOT_ENCODED}"
    if any(int(host[1] or 0) > _LAST_PORT for host in hosts if host):
        return f"must have ports of at most {_LAST_PORT}"
    try:
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        return f"must have pairs of name=value behind the `?`, and {_NOT_ENCODED}"
    ports = query.get("port", "").split(",")
    if not all(_PORT.fullmatch(port) and int(port or 0) <= _LAST_PORT for port in ports):
        return "must have a number for `port`"
    if query.get("sslmode", "prefer") not in _SSL_MODES:
        return f"must have one of these for `sslmode`: {', '.join(_SSL_MODES)}"
    if query.get("target_session_attrs", "any") not in _SESSIONS:
        return f"must have one of these for `target_session_attrs`: {', '.join(_SESSIONS)}"
    return None


_NOT_ENCODED: Final = "must have what is special in its user and password percent-encoded, as @ : / ? # [ ] and % are"
_PERCENT: Final = re.compile("%(?![0-9A-Fa-f]{2})")
_PORT: Final = re.compile("[0-9]{0,5}")
#: A name or an address, or a directory of sockets in percent-encoding.
_HOST: Final = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[\w.%-]+)(?::([0-9]{1,5}))?")
_LAST_PORT: Final = 65_535
_SESSIONS: Final = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SPAN: Final[TypeAdapter[timedelta | None]] = TypeAdapter(Annotated[timedelta | None, BeforeValidator(_retention)])
Duration = Annotated[timedelta, BeforeValidator(_duration), Field(gt=timedelta(0))]


def faults(error: ValidationError) -> list[str]:
    """What is wrong with settings, each by its variable and without its value."""
    found = []
    for fault in error.errors(include_url=False, include_input=False):
        name = "QUOTES_" + "_".join(str(part) for part in fault["loc"]).upper()
        found.append(f"{name if fault['loc'] else 'settings'}: {fault['msg']}")
    return found


#: What `serve --workers` tells its processes; not a setting.
METRICS_DIRECTORY: Final = "QUOTES_METRICS_DIR"


def metrics_directory() -> Path | None:
    """Where several processes share their metrics: what `serve --workers` made.

    prometheus_client has a variable of its own for that, which another program may have set for other metrics.
    """
    value = os.environ.get(METRICS_DIRECTORY)
    return None if value is None else Path(value)


def misspelt() -> dict[str, str | None]:
    """Variables `QUOTES_…` of the environment and of `.env` that are no setting, each with the nearest that is one."""
    known = [f"QUOTES_{name.upper()}" for name in Settings.model_fields]
    given = {name.upper() for name in (*os.environ, *DotEnvSettingsSource(Settings).env_vars)}
    unknown = sorted(name for name in given if name.startswith("QUOTES_") and name not in {*known, METRICS_DIRECTORY})
    return {name: next(iter(get_close_matches(name, known, 1)), None) for name in unknown}


class Settings(BaseSettings):
    """Settings of the service; each field is the variable `QUOTES_<FIELD IN CAPITALS>`.

    Durations are written `30 days`, `2 years` (a year is 365 days), `1 hour`, or as ISO 8601 (`P30D`).

    Raises:
        pydantic.ValidationError: a value does not fit, or is contradicted by another one.
    """

    model_config = SettingsConfigDict(
        env_prefix="QUOTES_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = Field(
        default=None,
        description="`postgresql://user:password@host:port/name` of the store. Unset: an embedded PostgreSQL.",
    )
    read_database_url: SecretStr | None = Field(
        default=None,
        description="The same for reads: `postgresql://user:password@host1:port,host2:port/name` of its replicas.",
    )
    max_replica_lag: Duration = Field(
        default=timedelta(seconds=10),
        ge=timedelta(seconds=2),
        description="Age above which what a replica has replayed is too old; reads then go to the primary.",
    )
    data_dir: Path | None = Field(
        default=None,
        description="Directory of the embedded PostgreSQL. Unset: the user's data directory, "
        "as root `/var/lib/opa-quotes`.",
    )
    require_timescaledb: Literal["community", "apache", "none"] | None = Field(
        default=None,
        description="Lowest capability level that counts as healthy. "
        "Unset: `community` with a database URL, `none` on the embedded default.",
    )
    migrate_on_start: bool = Field(default=True, description="Bring the schema up to date when the service starts.")

    host: str = Field(default="127.0.0.1", description="Address that `serve` listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port that `serve` listens on.")

    pool_size: int = Field(
        default=10,
        ge=0,
        description="Connections kept open. 0 opens one per operation, for a pooler with few sessions in front.",
    )
    pool_overflow: int = Field(default=20, ge=0, description="Connections opened above `pool_size` under load.")
    pool_timeout: Duration = Field(
        default=timedelta(seconds=5),
        description="Longest wait for a connection; one that is opened has a second at least.",
    )
    client_reads: int | None = Field(
        default=None,
        ge=1,
        description="Reads of one client at the database at once; its others wait for their turn. "
        "Unset: 4 with a database URL; half of the cores, from 1 to 4, on the embedded default, which shares them.",
    )
    statement_timeout: Duration = Field(
        default=timedelta(seconds=5), description="Longest run of one read before it is refused with 503."
    )
    write_timeout: Duration = Field(
        default=timedelta(seconds=30),
        description="Longest work of one transaction that writes; requests wait for it half as long at most.",
    )
    commit_timeout: Duration = Field(
        default=timedelta(seconds=10),
        description="Longest wait for a commit to be confirmed; then the outcome is unknown, and told so.",
    )

    retention: Annotated[timedelta | None, BeforeValidator(_retention)] = Field(
        default=None,
        validate_default=False,
        description="First value of the store: age after which raw quotes are dropped, or `none`. "
        "Unset: `2 years` with a database URL, `none` on the embedded default.",
    )
    chunk_interval: Duration = Field(
        default=timedelta(days=1), description="First value of the store: time span of one chunk."
    )
    compress_after: Duration = Field(
        default=timedelta(days=30),
        description="First value of the store: age at which a chunk moves to the columnstore.",
    )

    monitor_interval: Annotated[timedelta, BeforeValidator(_duration), Field(ge=timedelta(0))] = Field(
        default=timedelta(seconds=30), description="Time between two looks at the store for metrics. 0: none."
    )

    storage_capacity: int | None = Field(
        default=None,
        gt=0,
        description="Bytes that the database may fill, for `quotes_storage_free_bytes`. "
        "Unset: unknown, but of the embedded PostgreSQL what is free on its volume.",
    )

    prices: Literal["positive", "signed"] = Field(
        default="positive",
        description="`positive`: a price of 0 is an absent side, one below refused. `signed`: both are stored.",
    )
    max_body_bytes: int = Field(default=64 * MIB, ge=1024, description="Largest request body in bytes.")
    max_batch_rows: int = Field(default=100_000, ge=1, description="Most quotes in one request.")
    max_batch_days: int = Field(
        default=366, ge=1, description="Most distinct UTC days in one request; each is a chunk to lock."
    )
    max_symbols: int = Field(default=500, ge=1, description="Most symbols named in one read.")
    body_timeout: Duration = Field(
        default=timedelta(seconds=10), description="Longest wait for the next bytes of a request body."
    )
    body_rate: int = Field(
        default=10_000,
        ge=1,
        description="Least bytes a second of a request body, on average after its first `body_timeout`.",
    )
    trusted_proxies: str = Field(
        default="127.0.0.1,::1",
        description="Addresses and networks of proxies whose `X-Forwarded-For` is believed; `none`, or `*` for all.",
    )

    idempotency_expiry: Duration = Field(
        default=timedelta(hours=24), description="Time that an idempotency key and its receipt are kept."
    )

    writer_queue_rows: int = Field(
        default=500_000, ge=1, description="Quotes waiting to be written before ingest answers 503."
    )
    writer_queue_bytes: int = Field(
        default=256 * MIB, ge=1024, description="Bytes of quotes waiting before ingest answers 503."
    )
    writer_flush_rows: int = Field(default=50_000, ge=1, description="Most quotes in one transaction.")
    writer_flushes: int = Field(default=2, ge=1, description="Transactions in flight at once.")
    drain_timeout: Duration = Field(
        default=timedelta(seconds=20), description="Longest wait for requests in flight when the service stops."
    )

    page_token_key: SecretStr = Field(
        default=SecretStr("opa-quotes"),
        description="Key that signs page tokens. Tokens carry a position, never a permission.",
    )
    admin_token: SecretStr | None = Field(
        default=None,
        description="Bearer token of requests that delete quotes. Unset: they are all refused.",
    )
    otlp_endpoint: SecretStr | None = Field(
        default=None,
        description="Base URL of an OpenTelemetry collector that takes OTLP over HTTP; needs the extra `otel`.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="Log lines for people, for machines, or by whether stderr is a terminal."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Lowest level logged.")

    @field_validator("database_url", "read_database_url")
    @classmethod
    def _plain_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value().strip():
            return None
        if fault := url_fault(value.get_secret_value()):
            raise ValueError(fault)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses(cls, value: str) -> str:
        try:
            for part in () if value in {"*", "none"} else value.split(","):
                ip_network(part.strip())
        except ValueError as error:
            raise ValueError("must be addresses and networks such as 10.0.0.0/8, separated by commas") from error
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _http_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value().strip():
            return None
        if urlsplit(value.get_secret_value()).scheme not in {"http", "https"}:
            raise ValueError("must be an http:// or https:// URL")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.read_database_url is not None and self.database_url is None:
            raise ValueError("read_database_url names replicas of database_url, which is not set")
        # What the store has counts; so only those are compared that are told, each other one standing for what fits.
        told = self.model_fields_set
        retention = self.retention if "retention" in told else None
        interval = self.chunk_interval if "chunk_interval" in told else timedelta(minutes=1)
        compress = self.compress_after if "compress_after" in told else interval
        fault = fault_of(retention, interval, compress)
        if fault is not None:
            raise ValueError(fault)
        return self

    @property
    def embedded(self) -> bool:
        """Whether the service brings its own PostgreSQL."""
        return self.database_url is None

    @property
    def effective_client_reads(self) -> int:
        """Reads of one client at once, with the default applied.

        On two cores, beside eighty clients of one address that read 10,000 rows each, the write of another takes 1.5
        times as long with 1, 3 times with 2; with 1 they read a sixth less.
        """
        if self.client_reads is not None:
            return self.client_reads
        return min(max((os.cpu_count() or 1) // 2, 1), 4) if self.embedded else 4

    @property
    def required_level(self) -> Literal["community", "apache", "none"]:
        """The lowest capability level that is healthy here."""
        if self.require_timescaledb is not None:
            return self.require_timescaledb
        return "none" if self.embedded else "community"

    @property
    def effective_retention(self) -> timedelta | None:
        """Retention with its default applied: two years on a given database, none on the embedded one."""
        if "retention" in self.model_fields_set:
            return self.retention
        return None if self.embedded else timedelta(days=730)
