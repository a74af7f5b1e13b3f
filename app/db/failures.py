"""What the exceptions of the database driver mean, in errors of this project.

Invariant: no sentence has a part of a URL in it, which may be a part of its password; and what only an operator can
mend (a URL, a login, a privilege, the schema) is never told as something that passes.
"""

import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import asyncpg
from sqlalchemy.exc import DBAPIError

from app import metrics
from app.db import sessions
from app.errors import (
    DatabaseDamaged,
    DatabaseMisconfigured,
    DatabaseRefused,
    DatabaseUnavailable,
    QueryTimeout,
    QuotesError,
    QuotesLocked,
    SchemaMismatch,
)

Connection: TypeAlias = sessions.Connection

#: Whose mistake it is, in every sentence about a URL.
_URL: Final = "the database URL (QUOTES_DATABASE_URL)"
#: What the driver raises when it cannot speak to a server, or not any longer.
_DRIVER_FAILED: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_NOT_NOW: Final = (DatabaseUnavailable, "The database cannot serve the request now.")
_SCHEMA: Final = (
    SchemaMismatch,
    "Something is missing in the schema, or is another: see `opa-quotes health`, and run `opa-quotes migrate`.",
)
#: What a state, or else a class of states, says; of any other the statement itself is at fault.
_MEANING: Final[Mapping[str, tuple[type[QuotesError], str]]] = (
    {
        "57014": (QueryTimeout, "The statement ran over its time; ask for a shorter range or fewer symbols."),
        "55P03": (QuotesLocked, "Maintenance or another write holds a lock on these quotes for longer than is waited."),
        "53300": (
            DatabaseUnavailable,
            "The server takes no more connections: max_connections is reached, or the limit of the role or database.",
        ),
        "53400": (DatabaseRefused, "A limit in the database's configuration refuses this, as temp_file_limit does."),
        "XX": (DatabaseDamaged, "The database reports an error of its own; an operator has to look at its log."),
        "53100": (DatabaseUnavailable, "The volume of the database is full."),
        "25006": (
            DatabaseUnavailable,
            "The database is read-only: it is a standby, or default_transaction_read_only is on, and off is needed.",
        ),
        "40": (DatabaseUnavailable, "Other transactions were in the way."),
        "42501": (
            DatabaseMisconfigured,
            "The role lacks a privilege that the service needs: `opa-quotes health` says which.",
        ),
    }
    # A relation, a column, a function, a type or a key that is not there.
    | dict.fromkeys(("42P01", "42703", "42883", "42704", "42P10", "42809", "3F000"), _SCHEMA)
    # Classes that say "not now" rather than "never": connection, resources, operator intervention, system.
    | dict.fromkeys(("08", "53", "57", "58", "F0"), _NOT_NOW)
)
#: What a state, or else a class of states, says of a login; the user of a URL that is not encoded may be a part of a
#: password, so that the server's own words, which have it, are not passed on.
_LOGIN: Final = {
    "28P01": f"The server refuses the password in {_URL}, or its user.",
    "28": f"The server does not let in the user of {_URL}: its pg_hba.conf has no line for it that fits.",
    "3D000": f"The server has no database of the name in {_URL}.",
    "55000": f"The database of {_URL} takes no connections: ALTER DATABASE … ALLOW_CONNECTIONS true.",
    "42501": f"The user of {_URL} lacks CONNECT on its database: GRANT CONNECT ON DATABASE … TO ….",
}
_NO_LOGIN: Final = f"The server has no role of the name of the user in {_URL}, or one without LOGIN."
#: Where the server looks at a role, and at a database, before it lets a session in; its words are in any language.
_AT_ROLE: Final = "InitializeSessionUserId"
_AT_DATABASE: Final = "CheckMyDatabase"
_LIMITED: Final = {
    _AT_ROLE: "The role takes no more connections: its CONNECTION LIMIT is reached.",
    _AT_DATABASE: "The database takes no more connections: its CONNECTION LIMIT is reached.",
}
#: Shared memory, of which the server says no more than that it is out of it.
_LOCKS: Final = (
    "The server has no room for another lock: max_locks_per_transaction is too low for its chunks and connections;"
    " `opa-quotes health` says what is needed."
)
_REFUSED: Final = (DatabaseRefused, "The database refuses this statement; an operator has to look at its log.")
#: What does not pass by itself.
_LASTS: Final = (DatabaseRefused, DatabaseMisconfigured, DatabaseDamaged)


class PoolBusy(Exception):
    """All connections that a pool may have are in use, in a sentence."""


def _of_the_driver(error: BaseException) -> BaseException:
    """The driver's exception where SQLAlchemy has wrapped one; else the same."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def translate(error: BaseException) -> QuotesError | None:
    """The error of this project that a driver's exception stands for; None for what is not the database's."""
    error = _of_the_driver(error)
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if state == "53200" and "max_locks_per_transaction" in (error.hint or ""):
            return DatabaseUnavailable(_LOCKS)
        if state == "53300" and (limited := _LIMITED.get(_where(error))):
            return DatabaseUnavailable(limited)
        kind, detail = _MEANING.get(state) or _MEANING.get(state[:2]) or _REFUSED
        if isinstance(error, asyncpg.QueryCanceledError) and "user request" in str(error):
            detail = "Somebody cancelled the statement in the database; try again."
        return kind(detail)
    if isinstance(error, PoolBusy):
        return DatabaseUnavailable(str(error))
    if isinstance(error, socket.gaierror):
        return DatabaseUnavailable("The database cannot be reached: the name of its host is not known.")
    if isinstance(error, (*_DRIVER_FAILED, TimeoutError)):
        return DatabaseUnavailable("The database cannot be reached.")
    return None


def _where(error: asyncpg.PostgresError) -> str:
    return getattr(error, "server_source_function", None) or ""


def in_words(error: QuotesError) -> QuotesError | None:
    """The same error with the words of the server, of whatever refused a statement of a migration.

    These are of definitions: a privilege, a trigger, a limit. None for what passes.
    """
    statement = error.__cause__
    if not isinstance(error, _LASTS) or not isinstance(statement, DBAPIError) or statement.orig is None:
        return None
    cause = statement.orig.__cause__
    told = str(getattr(cause, "message", "")).partition("\n")[0].rstrip(".")
    where = next((line for line in str(getattr(cause, "context", "") or "").split("\n") if " function " in line), "")
    return type(error)(f"The database refuses the migration: {told}{where and f' ({where})'}.") if told else None


def _count(error: BaseException) -> None:
    """Count an error of the database; whatever else passes through is not one."""
    error = _of_the_driver(error)
    if isinstance(error, PoolBusy):
        metrics.DB_ERRORS.labels("pool").inc()
    elif isinstance(error, asyncpg.PostgresError) and error.sqlstate is not None and not connection_lost(error):
        # Forty classes at most, of the server's own.
        metrics.DB_ERRORS.labels(error.sqlstate[:2]).inc()
    elif translate(error) is not None:
        metrics.DB_ERRORS.labels("connection").inc()


def full(error: BaseException) -> bool:
    """Whether the server, its role or its database has no connection to spare."""
    return isinstance(_of_the_driver(error), asyncpg.TooManyConnectionsError)


@contextmanager
def translated() -> Iterator[None]:
    """Raise a driver's exceptions as errors of this project, and let all others through."""
    try:
        yield
    except QuotesError:
        raise
    except Exception as error:
        _count(error)
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


def connection_lost(error: BaseException) -> bool:
    """Whether the exception says that the connection, not the statement, failed.

    The driver's own client errors are among them: a server that goes away leaves the protocol between two states.
    """
    return isinstance(error, (*_DRIVER_FAILED, asyncpg.PostgresConnectionError)) or (
        isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith("57P")
    )


async def connect(
    url: str, *, timeout: float, statement_timeout: timedelta | None = None, **options: Any
) -> Connection:
    """A session of the service on the one host of a URL; the driver's exceptions come as they are but one kind.

    Raises:
        DatabaseMisconfigured: the URL, or the server, would have to be another.
    """
    with _url_faults(url):
        connection: Connection = await asyncpg.connect(url, timeout=timeout, **options)
    _keep_alive(connection)
    try:
        await sessions.prepare(connection, timeout, statement_timeout)
    except BaseException:
        connection.terminate()
        raise
    return connection


@contextmanager
def _url_faults(url: str) -> Iterator[None]:
    """Tell a URL that would have to be another from a server that is not there."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _misconfigured(f"The certificate of the server is not one that {_URL} asks for by `sslmode`.") from error
    except FileNotFoundError:
        if "sslrootcert=" in url or "sslcert=" in url or "sslcrl=" in url:
            raise _misconfigured(f"A file of certificates or keys that {_URL} names cannot be read.") from None
        raise  # a socket
    except ConnectionError as error:
        if "SSL upgrade" in str(error):
            raise _misconfigured(f"The server has no TLS, which {_URL} asks for by `sslmode`.") from error
        raise
    except (ValueError, KeyError) as error:
        if "root certificate" in str(error) or "root.crt" in str(error):
            raise _misconfigured(
                f"There is no root certificate to check the server by, as {_URL} asks for by `sslmode`; name one by"
                " `sslrootcert`."
            ) from None
        # The driver's words have parts of the URL in them, and so has the traceback.
        raise _misconfigured(f"The driver cannot read {_URL}; what is special in a URL is percent-encoded.") from None
    except asyncpg.PostgresError as error:
        if detail := _refused(error, url):
            raise _misconfigured(detail) from error
        raise


def _refused(error: asyncpg.PostgresError, url: str) -> str:
    """Why the server lets nobody in by this URL; empty if that may pass."""
    query, state = dict(parse_qsl(urlsplit(url).query)), error.sqlstate or ""
    refused = [name for name in query if f'"{name}"' in str(error)]
    if refused or (state.startswith(("42", "22")) and state not in _LOGIN):
        # What follows a password that is not encoded may be a part of it.
        name = f"the parameter `{refused[0]}`" if refused and "password" not in query else "a parameter"
        return f"The server does not take {name} behind the `?` of {_URL}."
    if state.startswith("28") and _where(error) == _AT_ROLE:
        return _NO_LOGIN
    return _LOGIN.get(state) or _LOGIN.get(state[:2], "")


def _keep_alive(connection: Connection) -> None:
    """Notice within half a minute that the other machine is gone, also while a statement is waited for."""
    line = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]  # noqa: SLF001  not offered otherwise
    if line is None or line.family == getattr(socket, "AF_UNIX", None):
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if (option := getattr(socket, name, None)) is not None:
            line.setsockopt(socket.IPPROTO_TCP, option, value)


def _misconfigured(detail: str) -> DatabaseMisconfigured:
    metrics.DB_ERRORS.labels("connection").inc()
    return DatabaseMisconfigured(detail)
