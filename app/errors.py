"""What can go wrong, as one tree; each class knows its HTTP status, code and title.

    QuotesError
    ├── InvalidRequest          400  the request itself is malformed
    │   ├── InvalidPageToken    400
    │   └── MalformedBody       400  not parseable at all
    ├── InvalidQuotes           422  rows that break a rule, each named
    ├── Forbidden               403  an administrator's request without an administrator's token
    ├── Conflict                409  on_conflict=error met stored keys
    ├── IdempotencyKeyInUse     409  the first request with the key is not answered yet
    ├── IdempotencyKeyReused    422  the key belongs to a request with another body
    ├── BodyTooLarge            413
    ├── BodyTimeout             408
    ├── UnsupportedMediaType    415
    │   └── UnsupportedEncoding 415
    ├── NotAcceptable           406
    ├── Overloaded              503  the write queue is full, or this client has its share
    ├── ReaderUnavailable       503  no process reads the body, or it was ended from outside
    ├── DatabaseUnavailable     503  cannot reach or use the database
    │   ├── OutcomeUnknown      503  nobody knows whether a commit has happened
    │   ├── CommitsWaiting      503  too many commits wait for a standby already, or one holds a lock
    │   ├── QuotesLocked        503  maintenance holds the chunk, or another write the key
    │   ├── SettingsChanged         503  the store keeps fewer quotes than a moment ago
    │   ├── DatabaseRefused     503  the database will not do this, and would not later either
    │   ├── DatabaseMisconfigured 503  a URL, a login or a privilege has to be another
    │   │   └── SchemaMismatch  503  the schema is not the one that this version needs
    │   └── DatabaseDamaged     503  the database found itself damaged
    ├── QueryTimeout            503  a statement ran over its time
    │   └── WriteTimeout        503  a write did
    ├── ServiceStopping         503
    ├── StartupError            -    the service cannot start (embedded database, migration)
    │   └── StartupRefused      -    and no restart mends that
    └── BackupError             -    a backup or a restore cannot be done, or failed

Invariant: a message never carries SQL, a URL with a password, or an echo of the client's values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self


@dataclass(frozen=True, slots=True)
class Rejection:
    """One refused row: its zero-based `index` in the request, a JSON pointer, a stable code, a sentence."""

    index: int
    pointer: str
    code: str
    detail: str


class QuotesError(Exception):
    """Base of all errors that the service answers for."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    retry_after: float | None = None
    #: Whether a start that fails by it fails again until somebody changes something.
    lasts: ClassVar[bool] = False

    def __init__(self, detail: str, *, pointer: str | None = None, parameter: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.parameter = parameter


class InvalidRequest(QuotesError):
    """A parameter, or a combination of parameters, has no meaning."""

    status = 400
    code = "invalid-request"
    title = "Invalid request"


class InvalidPageToken(InvalidRequest):
    """A page token that this service did not issue for this query."""

    code = "invalid-page-token"
    title = "Invalid page token"


class MalformedBody(InvalidRequest):
    """A body that cannot be parsed, so that no row can be named."""

    code = "malformed-body"
    title = "Malformed body"


class InvalidQuotes(QuotesError):
    """Rows that break a rule; nothing of the request was stored.

    `rejections` lists the first `len(rejections)` of `total` refused rows.
    """

    status = 422
    code = "invalid-quotes"
    title = "Quotes refused"

    def __init__(self, rejections: Sequence[Rejection], received: int) -> None:
        self.rejections = list(rejections)
        self.received = received
        super().__init__(f"{len(self.rejections)} of {received} quotes break a rule; nothing was stored.")


class Forbidden(QuotesError):
    """A request that only an administrator may make, without the token that says so."""

    status = 403
    code = "forbidden"
    title = "Forbidden"


class Conflict(QuotesError):
    """`on_conflict=error` met quotes whose key is already stored; nothing of the request was stored."""

    status = 409
    code = "conflict"
    title = "Quotes already stored"

    def __init__(self, rejections: Sequence[Rejection], received: int) -> None:
        self.rejections = list(rejections)
        self.received = received
        super().__init__(f"{len(self.rejections)} of {received} quotes are already stored; nothing was stored.")


class IdempotencyKeyInUse(QuotesError):
    """A request with the same idempotency key is being worked on; this one did nothing."""

    status = 409
    code = "idempotency-key-in-use"
    title = "Idempotency key in use"
    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__(
            "A request with this idempotency key is being worked on; send the same again later.",
            parameter="Idempotency-Key",
        )


class IdempotencyKeyReused(QuotesError):
    """The idempotency key was taken by a request that asked for something else; this one did nothing."""

    status = 422
    code = "idempotency-key-reused"
    title = "Idempotency key reused"

    def __init__(self) -> None:
        super().__init__(
            "This idempotency key belongs to another request; a new request has a new key.",
            parameter="Idempotency-Key",
        )


class BodyTooLarge(QuotesError):
    """More bytes or rows than one request may carry."""

    status = 413
    code = "body-too-large"
    title = "Request too large"

    @classmethod
    def beyond(cls, limit: int) -> Self:
        """The refusal of a body that has more bytes than `limit`, as it came or decompressed."""
        return cls(f"A body has at most {limit} bytes, also when decompressed; send smaller batches.")


class BodyTimeout(QuotesError):
    """The client took too long to send its body."""

    status = 408
    code = "body-timeout"
    title = "Request timed out"


class UnsupportedMediaType(QuotesError):
    """A content type that no codec reads."""

    status = 415
    code = "unsupported-media-type"
    title = "Unsupported media type"


class UnsupportedEncoding(UnsupportedMediaType):
    """A content encoding other than those listed in `accepted`, as for the header `Accept-Encoding`."""

    code = "unsupported-encoding"
    title = "Unsupported content encoding"

    def __init__(self, detail: str, *, accepted: str) -> None:
        super().__init__(detail)
        self.accepted = accepted


class NotAcceptable(QuotesError):
    """The client accepts none of the formats that this route writes."""

    status = 406
    code = "not-acceptable"
    title = "Not acceptable"


class Overloaded(QuotesError):
    """The write queue is full, or this client has its share; nothing of the request was stored."""

    status = 503
    code = "overloaded"
    title = "Too much is waiting"

    def __init__(self, detail: str, *, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class ReaderUnavailable(QuotesError):
    """The body could not be read, for no fault of its own; nothing of the request was stored."""

    status = 503
    code = "reader-unavailable"
    title = "The body could not be read"
    retry_after = 1.0


class DatabaseUnavailable(QuotesError):
    """The database cannot be reached or refuses to work; a write of this request was not stored."""

    status = 503
    code = "database-unavailable"
    title = "Database unavailable"
    retry_after: float | None = 1.0


class OutcomeUnknown(DatabaseUnavailable):
    """A commit was not confirmed: it may have happened, or may yet happen; sending the same again is harmless."""

    code = "outcome-unknown"
    title = "Outcome unknown"


class CommitsWaiting(DatabaseUnavailable):
    """Commits of before are not confirmed yet, too many of them or one that may hold a lock; nothing was stored."""

    code = "commits-waiting"
    title = "Commits are waiting"
    retry_after = 5.0


class QuotesLocked(DatabaseUnavailable):
    """Somebody holds a lock on what is to be written for longer than a write waits; nothing was stored."""

    code = "quotes-locked"
    title = "Quotes are locked"
    retry_after = 5.0


class SettingsChanged(DatabaseUnavailable):
    """The store's retention has become shorter since the quotes were checked; nothing was stored."""

    code = "settings-changed"
    title = "Settings have changed"

    def __init__(self) -> None:
        super().__init__("The retention of the store has become shorter; send the same again to see what it takes.")


class DatabaseRefused(DatabaseUnavailable):
    """The database refuses a statement for what it is, so that waiting does not help; nothing was stored."""

    code = "database-refused"
    title = "Refused by the database"
    retry_after = None


class DatabaseMisconfigured(DatabaseUnavailable):
    """A URL, a login or a privilege is not what it has to be, which waiting does not change; nothing was stored."""

    code = "database-misconfigured"
    title = "Database misconfigured"
    retry_after = None
    lasts = True


class SchemaMismatch(DatabaseMisconfigured):
    """The schema is not the one that this version of the service needs; nothing was stored."""

    code = "schema-mismatch"
    title = "Schema of another version"


class DatabaseDamaged(DatabaseUnavailable):
    """The database reports an error of its own: a page or an index is damaged, or its program is at fault."""

    code = "database-damaged"
    title = "Database damaged"
    retry_after = None


class QueryTimeout(QuotesError):
    """A statement ran over `statement_timeout`; ask for a shorter range or fewer symbols."""

    status = 503
    code = "query-timeout"
    title = "Query timed out"
    retry_after = 1.0


class WriteTimeout(QueryTimeout):
    """A write ran over its time; nothing was stored."""

    code = "write-timeout"
    title = "Write timed out"

    def __init__(self) -> None:
        super().__init__(
            "These quotes could not be stored in time; nothing was stored. Send fewer at once: what takes long is to"
            " change quotes of many symbols and days in the columnstore."
        )


class ServiceStopping(QuotesError):
    """The service is draining and takes no more quotes."""

    status = 503
    code = "service-stopping"
    title = "Service is stopping"
    retry_after = 1.0


class StartupError(QuotesError):
    """The service cannot start; the message says what to do."""

    code = "startup-error"
    title = "Cannot start"


class StartupRefused(StartupError):
    """The service cannot start with this database as it is; the message says what to change."""

    lasts = True


class BackupError(QuotesError):
    """A backup or a restore cannot be done, or failed; the message says why and what is left."""

    code = "backup-error"
    title = "Backup failed"
