"""Every metric of the service, declared once.

Invariant: labels take values from small fixed sets, never from a request. A gauge of the store has no series until
it was measured, because zero would be a figure. They are in a registry of their own: a program that imports the
repository as a library has its own metrics, which these are none of.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal

import prometheus_client
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, GCCollector, Metric, PlatformCollector, ProcessCollector

from app import workers

workers.share_metrics()
REGISTRY: Final = CollectorRegistry(auto_describe=True)
for _collector in (ProcessCollector, PlatformCollector, GCCollector):
    _collector(registry=REGISTRY)
Counter: Final = partial(prometheus_client.Counter, registry=REGISTRY)
Gauge: Final = partial(prometheus_client.Gauge, registry=REGISTRY)
Histogram: Final = partial(prometheus_client.Histogram, registry=REGISTRY)

Role = Literal["primary", "replica"]

# Around the 100 ms objective the buckets are close together, so that a quantile there is worth reading.
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS: Final = (1, 10, 100, 1_000, 5_000, 10_000, 50_000, 100_000)
BODY_BUCKETS: Final = tuple(4**n for n in range(4, 14))  # 256 bytes to 64 MiB
# From a quote that was posted at once to one of yesterday.
LAG_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)
#: A row that is this much older than its arrival is late, in seconds.
LATE: Final = 3600


class Measured(prometheus_client.Gauge):
    """A gauge without labels that has no series until it is set."""

    _is_set = False

    def __init__(self, name: str, documentation: str, *, multiprocess_mode: Any) -> None:
        super().__init__(name, documentation, registry=REGISTRY, multiprocess_mode=multiprocess_mode)

    def set(self, value: float) -> None:
        """Set the value, and from now on show it."""
        self._is_set = True
        super().set(value)

    def collect(self) -> Iterable[Metric]:
        """The series, if there is one."""
        return super().collect() if self._is_set else ()


INGEST_ROWS: Final = Counter(
    "quotes_ingest_rows_total", "Quotes acknowledged or refused, by what became of them.", ["result"]
)
INGEST_BATCH_ROWS: Final = Histogram("quotes_ingest_batch_rows", "Quotes in one request.", buckets=SIZE_BUCKETS)
INGEST_REFUSED: Final = Counter(
    "quotes_ingest_rejected_requests_total", "Ingest requests refused as a whole, by error code.", ["reason"]
)
INGEST_CROSSED: Final = Counter("quotes_ingest_crossed_rows_total", "Stored quotes whose bid was above their ask.")
INGEST_LAG_SECONDS: Final = Histogram(
    "quotes_ingest_event_lag_seconds",
    "From the newest timestamp of a stored batch to its arrival.",
    buckets=LAG_BUCKETS,
)
INGEST_LATE: Final = Counter(
    "quotes_ingest_late_rows_total", "Stored rows that were more than an hour old when they arrived."
)
READERS: Final = Gauge("quotes_readers", "Processes that read bodies.", multiprocess_mode="livesum")
READER_CPU: Final = Counter("quotes_reader_cpu_seconds_total", "Time of the processor that readers took for bodies.")
READER_ENDS: Final = Counter(
    "quotes_reader_ends_total",
    "Readers that ended over a body: `crash`, `time` if it took too long, `killed` from outside.",
    ["reason"],
)
WRITER_QUEUE_ROWS: Final = Gauge(
    "quotes_writer_queue_rows", "Quotes waiting to be written or being written.", multiprocess_mode="livesum"
)
WRITER_QUEUE_LIMIT: Final = Gauge(
    "quotes_writer_queue_limit_rows", "Quotes that may wait before ingest answers 503.", multiprocess_mode="livesum"
)
WRITER_FLUSH_ROWS: Final = Histogram("quotes_writer_flush_rows", "Quotes in one transaction.", buckets=SIZE_BUCKETS)
WRITER_FLUSH_SECONDS: Final = Histogram(
    "quotes_writer_flush_seconds", "Duration of one transaction.", buckets=LATENCY_BUCKETS
)
WRITER_WAIT_SECONDS: Final = Histogram(
    "quotes_writer_wait_seconds", "Wait of a request before its transaction began.", buckets=LATENCY_BUCKETS
)
COMMITS_LEFT: Final = Counter(
    "quotes_commits_left_total", "Commits that the database did not confirm in time, so that their outcome is unknown."
)
COMMITS_WAITING: Final = Measured(
    "quotes_commits_waiting",
    "Commits that a synchronous standby has not confirmed for a second.",
    multiprocess_mode="livemostrecent",
)
HEALTH_UP: Final = Gauge(
    "quotes_health_check_up",
    "1 when the last run of a health check was healthy, degraded or skipped.",
    ["check"],
    multiprocess_mode="livemostrecent",
)
BUILD_INFO: Final = Gauge(
    "quotes_build_info",
    "1, labelled with the version and the capability level.",
    ["version", "level"],
    multiprocess_mode="livemax",
)
READS: Final = Counter("quotes_reads_total", "Reads by the role of the server asked; a retry counts again.", ["role"])
READ_RETRIES: Final = Counter("quotes_read_retries_total", "Reads that failed on a replica and went to another server.")
REPLICA_LAG: Final = Gauge(
    "quotes_replica_lag_seconds",
    "Age of what a replica is known to have replayed, at most; infinite while it cannot be used.",
    ["replica"],
    multiprocess_mode="livemax",
)
WRITABLE_SERVERS: Final = Measured(
    "quotes_writable_servers",
    "Servers that take writes, of those that the database URLs name; one under two names counts once.",
    multiprocess_mode="livemax",
)
CLOCK_DIFFERENCE: Final = Measured(
    "quotes_clock_difference_seconds",
    "How far the clock of this service is ahead of the database's; negative if it is behind.",
    multiprocess_mode="livemostrecent",
)
SETTINGS_DIFFER: Final = Measured(
    "quotes_settings_differ",
    "Settings of the service that are others in the store, whose count.",
    multiprocess_mode="livemostrecent",
)
POOL_IN_USE: Final = Gauge(
    "quotes_db_pool_checked_out_connections",
    "Pooled database connections in use.",
    ["role"],
    multiprocess_mode="livesum",
)
POOL_MAX: Final = Gauge(
    "quotes_db_pool_max_connections",
    "Most pooled database connections that may be open at once.",
    ["role"],
    multiprocess_mode="livesum",
)
POOL_WAIT_SECONDS: Final = Histogram(
    "quotes_db_pool_wait_seconds",
    "Wait for a pooled connection, with its opening if none was open.",
    ["role"],
    buckets=LATENCY_BUCKETS,
)
DB_ERRORS: Final = Counter(
    "quotes_db_errors_total",
    "Database operations that failed, by the first two characters of the SQLSTATE; "
    "`connection` where the connection was lost or refused, `pool` where none was free in time.",
    ["sqlstate_class"],
)
STORAGE_SIZE: Final = Measured(
    "quotes_storage_size_bytes",
    "Bytes of the database on disk, all of it.",
    multiprocess_mode="livemostrecent",
)
STORAGE_FREE: Final = Measured(
    "quotes_storage_free_bytes",
    "Bytes that the database may still take.",
    multiprocess_mode="livemostrecent",
)
LATEST_QUOTE: Final = Measured(
    "quotes_latest_quote_timestamp_seconds",
    "Newest timestamp of a stored quote.",
    multiprocess_mode="livemostrecent",
)
BACKUP: Final = Measured(
    "quotes_backup_last_success_timestamp_seconds",
    "When the newest backup on record was whole.",
    multiprocess_mode="livemostrecent",
)
STORAGE_BYTES: Final = Gauge(
    "quotes_storage_bytes",
    "Bytes of the store with indexes, by what holds them.",
    ["state"],
    multiprocess_mode="livemostrecent",
)
MONITOR_UP: Final = Measured(
    "quotes_monitor_up", "1 if the last look at the store succeeded.", multiprocess_mode="livemostrecent"
)
CHUNKS: Final = Gauge(
    "timescaledb_hypertable_chunks",
    "Chunks of the raw quotes, by state.",
    ["state"],
    multiprocess_mode="livemostrecent",
)
COMPRESSION_BEFORE: Final = Measured(
    "timescaledb_compression_before_bytes",
    "Bytes of the compressed chunks before they were.",
    multiprocess_mode="livemostrecent",
)
COMPRESSION_AFTER: Final = Measured(
    "timescaledb_compression_after_bytes",
    "Bytes of the compressed chunks right after.",
    multiprocess_mode="livemostrecent",
)
WATERMARK: Final = Gauge(
    "timescaledb_cagg_watermark_timestamp_seconds",
    "Time up to which a rollup is materialised.",
    ["rollup"],
    multiprocess_mode="livemostrecent",
)
WATERMARK_LAG: Final = Gauge(
    "timescaledb_cagg_watermark_lag_seconds",
    "From what a rollup has materialised to the newest quote.",
    ["rollup"],
    multiprocess_mode="livemostrecent",
)
STALE_RANGES: Final = Gauge(
    "timescaledb_cagg_stale_ranges",
    "Ranges below a rollup's watermark that got late quotes and wait for a refresh.",
    ["rollup"],
    multiprocess_mode="livemostrecent",
)
JOB_SUCCESS: Final = Gauge(
    "timescaledb_job_last_run_success",
    "1 if the last run of a background job succeeded.",
    ["job_name"],
    multiprocess_mode="livemostrecent",
)
JOB_FINISHED: Final = Gauge(
    "timescaledb_job_last_successful_finish_timestamp_seconds",
    "When a background job last succeeded.",
    ["job_name"],
    multiprocess_mode="livemostrecent",
)
JOB_INTERVAL: Final = Gauge(
    "timescaledb_job_schedule_interval_seconds",
    "Time between two runs of a background job.",
    ["job_name"],
    multiprocess_mode="livemostrecent",
)
HTTP_REQUESTS: Final = Counter("quotes_http_requests_total", "HTTP requests.", ["handler", "method", "code"])
HTTP_SECONDS: Final = Histogram(
    "quotes_http_request_duration_seconds",
    "Time from the request to the end of its response.",
    ["handler", "method"],
    buckets=LATENCY_BUCKETS,
)
HTTP_IN_PROGRESS: Final = Gauge(
    "quotes_http_requests_in_progress", "HTTP requests that were not answered yet.", multiprocess_mode="livesum"
)
HTTP_BODY_BYTES: Final = Histogram(
    "quotes_http_request_body_bytes", "Bytes received of a request's body, if it had one.", buckets=BODY_BUCKETS
)

for _result in ("inserted", "updated", "unchanged", "superseded", "rejected"):
    INGEST_ROWS.labels(_result)
_ROLES: Final[tuple[Role, ...]] = ("primary", "replica")
for _role in _ROLES:
    READS.labels(_role)
    POOL_IN_USE.labels(_role)
    POOL_WAIT_SECONDS.labels(_role)
for _reason in ("crash", "time", "killed"):
    READER_ENDS.labels(_reason)
for _class in ("connection", "pool"):
    DB_ERRORS.labels(_class)


def observe_arrival(times: pa.Array | list[datetime], arrived: float) -> None:
    """Note how old the rows of a batch were at `arrived`, in seconds since 1970.

    `times` are the batch's timestamps, in microseconds or aware; there are none if every row was refused. A list of
    one takes 2 us, 10,000 in columns 20 us.
    """
    if not len(times):
        return
    late = datetime.fromtimestamp(arrived - LATE, UTC)
    late_rows = 0
    if isinstance(times, list):
        newest = max(times).timestamp()
        if min(times) < late:
            late_rows = sum(moment < late for moment in times)
    else:
        ends = pc.min_max(times)
        newest = ends["max"].value / 1e6
        if ends["min"].value / 1e6 < arrived - LATE:
            late_rows = pc.sum(pc.less(times, pa.scalar(late, times.type))).as_py()
    # A clock that runs ahead is no negative lag.
    INGEST_LAG_SECONDS.observe(max(0.0, arrived - newest))
    if late_rows:
        INGEST_LATE.inc(late_rows)


#: Statuses of requests whose time was their clients': a body that did not come, a client that went.
_CLIENTS_TIME: Final = frozenset({408, 499})


def observe_request(handler: str, method: str, status: int, seconds: float, body_bytes: int) -> None:
    """Count one request by its route's template, or `none`."""
    HTTP_REQUESTS.labels(handler, method, status).inc()
    if status not in _CLIENTS_TIME:
        HTTP_SECONDS.labels(handler, method).observe(seconds)
    if body_bytes:
        HTTP_BODY_BYTES.observe(body_bytes)
