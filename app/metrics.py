"""Every metric of the service, declared once.

Invariant: labels take values from small fixed sets, never from a request.
"""

from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nothing reads

# Around the 100 ms objective the buckets are close together, so that a quantile there is worth reading.
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS: Final = (1, 10, 100, 1_000, 5_000, 10_000, 50_000, 100_000)

INGEST_ROWS: Final = Counter(
    "quotes_ingest_rows_total", "Quotes acknowledged or refused, by what became of them.", ["result"]
)
INGEST_BATCH_ROWS: Final = Histogram("quotes_ingest_batch_rows", "Quotes in one request.", buckets=SIZE_BUCKETS)
INGEST_REFUSED: Final = Counter(
    "quotes_ingest_rejected_requests_total", "Ingest requests refused as a whole, by error code.", ["reason"]
)
INGEST_CROSSED: Final = Counter("quotes_ingest_crossed_rows_total", "Stored quotes whose bid was above their ask.")
WRITER_QUEUE_ROWS: Final = Gauge(
    "quotes_writer_queue_rows", "Quotes waiting to be written or being written.", multiprocess_mode="livesum"
)
WRITER_FLUSH_ROWS: Final = Histogram("quotes_writer_flush_rows", "Quotes in one transaction.", buckets=SIZE_BUCKETS)
WRITER_FLUSH_SECONDS: Final = Histogram(
    "quotes_writer_flush_seconds", "Duration of one transaction.", buckets=LATENCY_BUCKETS
)
WRITER_WAIT_SECONDS: Final = Histogram(
    "quotes_writer_wait_seconds", "Wait of a request before its transaction began.", buckets=LATENCY_BUCKETS
)
HEALTH_UP: Final = Gauge(
    "quotes_health_check_up",
    "1 when the last run of a health check was healthy, degraded or skipped.",
    ["check"],
    multiprocess_mode="livemin",
)
BUILD_INFO: Final = Gauge(
    "quotes_build_info",
    "1, labelled with the version and the capability level.",
    ["version", "level"],
    multiprocess_mode="livemax",
)
READS: Final = Counter("quotes_reads_total", "Reads by the role of the server asked; a retry counts again.", ["role"])
READ_RETRIES: Final = Counter("quotes_read_retries_total", "Reads that failed on a replica and ran on the primary.")
REPLICA_LAG: Final = Gauge(
    "quotes_replica_lag_seconds",
    "Age of what a replica is known to have replayed, at most; infinite while it cannot be used.",
    ["replica"],
    multiprocess_mode="livemax",
)

for _role in ("primary", "replica"):
    READS.labels(_role)
STORAGE_BYTES: Final = Gauge(
    "quotes_storage_bytes",
    "Bytes of the store with indexes, by what holds them.",
    ["state"],
    multiprocess_mode="livemostrecent",
)
MONITOR_UP: Final = Gauge(
    "quotes_monitor_up", "1 if the last look at the store succeeded.", multiprocess_mode="livemin"
)
CHUNKS: Final = Gauge(
    "timescaledb_hypertable_chunks",
    "Chunks of the raw quotes, by state.",
    ["state"],
    multiprocess_mode="livemostrecent",
)
COMPRESSION_BEFORE: Final = Gauge(
    "timescaledb_compression_before_bytes",
    "Bytes of the compressed chunks before they were.",
    multiprocess_mode="livemostrecent",
)
COMPRESSION_AFTER: Final = Gauge(
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
    ["job"],
    multiprocess_mode="livemostrecent",
)
JOB_FINISHED: Final = Gauge(
    "timescaledb_job_last_successful_finish_timestamp_seconds",
    "When a background job last succeeded.",
    ["job"],
    multiprocess_mode="livemostrecent",
)
JOB_INTERVAL: Final = Gauge(
    "timescaledb_job_schedule_interval_seconds",
    "Time between two runs of a background job.",
    ["job"],
    multiprocess_mode="livemostrecent",
)

for _result in ("inserted", "updated", "unchanged", "superseded", "rejected"):
    INGEST_ROWS.labels(_result)


HTTP_REQUESTS: Final = Counter("quotes_http_requests_total", "HTTP requests.", ["handler", "method", "code"])
HTTP_SECONDS: Final = Histogram(
    "quotes_http_request_duration_seconds",
    "Time from the request to the end of its response.",
    ["handler", "method"],
    buckets=LATENCY_BUCKETS,
)


def observe_request(info: Any) -> None:
    """Count one request, by route template, method and status code."""
    HTTP_REQUESTS.labels(info.modified_handler, info.method, info.modified_status).inc()
    HTTP_SECONDS.labels(info.modified_handler, info.method).observe(info.modified_duration)
