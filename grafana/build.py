"""Writes the dashboards of Grafana: `python -m grafana.build`, whose output is committed.

Invariant: a line in a panel is the threshold of an alert, read from prometheus/rules/alerts.yml, so that there is one
place for each number. A panel asks the data source that its dashboard's variable names, and has an identity by its
place in the list; nothing else here knows where anything lies on the screen.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[1]
DASHBOARDS: Final = ROOT / "grafana" / "dashboards"
PROMETHEUS: Final = {"type": "prometheus", "uid": "${datasource}"}
POSTGRESQL: Final = {"type": "grafana-postgresql-datasource", "uid": "${datasource}"}
#: What every query of the service's own metrics selects; recorded series have no instance any more.
INSTANCE: Final = 'job=~"$job",instance=~"$instance"'
JOB: Final = 'job=~"$job"'
_WIDTH: Final = 24

_GREEN: Final = {"color": "green", "value": None}


@cache
def alerts() -> list[dict[str, Any]]:
    """Every alerting rule, not to be changed; a panel in three asks, and reading takes 0.1 s."""
    document = yaml.safe_load((ROOT / "prometheus" / "rules" / "alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def threshold(alert: str, window: str | None = None) -> float:
    """The number at which an alert fires, for burn rates that of one window."""
    for rule in alerts():
        if rule["alert"] == alert and rule["labels"].get("window") == window:
            return float(rule["annotations"]["threshold"])
    raise LookupError(alert)


@dataclass(frozen=True)
class Line:
    """A threshold: from `value` on it is bad, or below it where `below`."""

    alert: str
    window: str | None = None
    below: bool = False
    color: str = "red"

    @property
    def value(self) -> float:
        """The number, from the alert."""
        return threshold(self.alert, self.window)


@dataclass(frozen=True)
class Panel:
    """One panel: its queries as (expression, legend), and how they are shown."""

    title: str
    description: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    lines: Sequence[Line] = ()
    stacked: bool = False
    #: Units of further series, by a pattern of their legend; they get the axis on the right.
    right: dict[str, str] = field(default_factory=dict)
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    table: bool = False

    def to_dict(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana reads it."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": POSTGRESQL if self.table else PROMETHEUS,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [self._target(index, *query) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": self._options(),
        }

    def _target(self, index: int, query: str, legend: str) -> dict[str, Any]:
        reference = chr(ord("A") + index)
        if self.table:
            return {
                "refId": reference,
                "datasource": POSTGRESQL,
                "format": "table",
                "rawQuery": True,
                "editorMode": "code",
                "rawSql": query,
            }
        instant = self.kind == "stat"
        return {
            "refId": reference,
            "datasource": PROMETHEUS,
            "expr": query,
            "legendFormat": legend,
            "range": not instant,
            "instant": instant,
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": self._steps()}}
        if self.kind == "timeseries":
            if not self.table:  # prices may lie below zero, and close together far above it
                defaults["min"] = 0
            defaults["custom"] = {
                "fillOpacity": 30 if self.stacked else 0,
                "lineWidth": 1,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.lines else "off"},
            }
        if self.kind in {"stat", "state-timeline"}:
            defaults["color"] = {"mode": "thresholds"}
        if self.states:
            defaults["mappings"] = [
                {
                    "type": "value",
                    "options": {
                        value: {"index": index, "text": text, "color": color}
                        for index, (value, (text, color)) in enumerate(self.states.items())
                    },
                }
            ]
        return defaults

    def _steps(self) -> list[dict[str, Any]]:
        """From the lowest value up: a colour counts from its value to the next."""
        if not self.lines:
            return [_GREEN]
        if self.lines[0].below:
            worst_first = sorted(self.lines, key=lambda line: line.value)
            colors = [line.color for line in worst_first] + ["green"]
            values = [None, *(line.value for line in worst_first)]
            return [{"color": color, "value": value} for color, value in zip(colors, values, strict=True)]
        ordered = sorted(self.lines, key=lambda line: line.value)
        return [_GREEN, *({"color": line.color, "value": line.value} for line in ordered)]

    def _overrides(self) -> list[dict[str, Any]]:
        return [
            {
                "matcher": {"id": "byRegexp", "options": pattern},
                "properties": [
                    {"id": "unit", "value": unit},
                    {"id": "custom.axisPlacement", "value": "right"},
                    {"id": "custom.stacking", "value": {"mode": "none", "group": "B"}},
                    {"id": "custom.fillOpacity", "value": 0},
                ],
            }
            for pattern, unit in self.right.items()
        ]

    def _options(self) -> dict[str, Any]:
        if self.kind == "stat":
            return {
                "colorMode": "background" if self.lines or self.states else "none",
                "graphMode": "none",
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "textMode": "auto",
            }
        legend = {"showLegend": True, "displayMode": "list", "placement": "bottom"}
        if self.kind == "state-timeline":
            return {"legend": legend, "mergeValues": True, "rowHeight": 0.8, "showValue": "never"}
        if self.kind == "candlestick":
            return {"mode": "candles+volume", "candleStyle": "candles", "colorStrategy": "open-close", "legend": legend}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


@dataclass(frozen=True)
class Row:
    """Panels under a heading, laid out from left to right."""

    title: str
    panels: Sequence[Panel]


def dashboard(
    uid: str, title: str, description: str, rows: Iterable[Row], variables: list[dict[str, Any]], *, refresh: str
) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    number = y = 0
    for row in rows:
        number += 1
        panels.append(
            {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
            }
        )
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            panels.append(panel.to_dict(number, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["opa-quotes"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": refresh,
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "utc",
        "annotations": {"list": []},
        "links": [
            {
                "title": "Dashboards",
                "type": "dashboards",
                "tags": ["opa-quotes"],
                "asDropdown": True,
                "includeVars": False,
                "keepTime": True,
            }
        ],
        "templating": {"list": variables},
        "panels": panels,
    }


def _datasource(kind: str) -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": kind,
        "hide": 0,
        "includeAll": False,
        "multi": False,
    }


def _labels(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": PROMETHEUS,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _custom(name: str, label: str, values: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "custom",
        "query": ",".join(values),
        "options": [{"text": v, "value": v, "selected": v == values[0]} for v in values],
        "current": {"text": values[0], "value": values[0]},
        "multi": False,
        "includeAll": False,
    }


def _rate(metric: str, by: str, matchers: str = "") -> str:
    """A sum of rates; `by` names the labels that stay."""
    selected = f"{metric}{{{INSTANCE}{',' + matchers if matchers else ''}}}"
    return f"sum by ({by}) (rate({selected}[$__rate_interval]))"


def _quantile(q: float, metric: str, by: str = "", matchers: str = "") -> str:
    return f"histogram_quantile({q}, {_rate(f'{metric}_bucket', f'{by}, le' if by else 'le', matchers)})"


def _of_30_days(rate: str) -> str:
    return f"sum_over_time(operation:quotes_http_{rate}:rate5m{{{JOB}}}[30d])"


def _of_jobs(metric: str) -> str:
    return f"max by (job_name) ({metric}{{{INSTANCE}}})"


_SUCCESS: Final = "timescaledb_job_last_successful_finish_timestamp_seconds"
_EVERY: Final = "timescaledb_job_schedule_interval_seconds"
HEALTHY: Final = {"0": ("unhealthy", "red"), "1": ("healthy", "green")}
LATENCY: Final = (Line("QuotesLatencyP99High"),)
CHECKS: Final = f"min by (check) (quotes_health_check_up{{{INSTANCE}}})"

OVERVIEW: Final = (
    Row(
        "Overview",
        (
            Panel(
                "Firing alerts",
                "Of this service and its PostgreSQL.",
                [('count(ALERTS{alertstate="firing",job=~"quotes.*"}) or vector(0)', "")],
                kind="stat", width=3, height=4,
            ),
            Panel(
                "Instances that answer",
                "Scrapes that succeed.",
                [(f"sum(up{{{INSTANCE}}})", "")],
                kind="stat", width=3, height=4,
            ),
            Panel(
                "Quotes stored",
                "Acknowledged in the last five minutes, those that were stored already included.",
                [(f"sum(job:quotes_ingest_acknowledged_rows:rate5m{{{JOB}}})", "")],
                "rowsps", "stat", 4, 4,
            ),
            Panel(
                "Newest quote",
                "Its age.",
                [(f"min(job:quotes_freshness_seconds:min{{{JOB}}})", "")],
                "s", "stat", 4, 4, (Line("QuotesStale"),),
            ),
            Panel(
                "Errors",
                "Share of requests answered with 5xx in the last five minutes, of the worse operation.",
                [(f"max(operation:quotes_http_errors:ratio5m{{{JOB}}}) or vector(0)", "")],
                "percentunit", "stat", 3, 4, (Line("QuotesErrorsHigh"),),
            ),
            Panel(
                "p99",
                "Of the slower operation, in the last five minutes.",
                [(f"max(operation:quotes_http_request_duration_seconds:p99{{{JOB}}})", "")],
                "s", "stat", 3, 4, LATENCY,
            ),
            Panel(
                "Space left",
                "Share of what the database may take. Empty where QUOTES_STORAGE_CAPACITY is not set.",
                [(f"min(job:quotes_storage_free:ratio{{{JOB}}})", "")],
                "percentunit", "stat", 4, 4, (Line("QuotesStorageLow", below=True),),
            ),
            Panel(
                "Throughput",
                "Quotes by what became of them, and requests on the right.",
                [
                    (_rate("quotes_ingest_rows_total", "result"), "{{result}}"),
                    (_rate("quotes_http_requests_total", "method"), "{{method}} requests"),
                ],
                "rowsps", width=12, right={".* requests": "reqps"},
            ),
            Panel(
                "Latency",
                "Of reads, and of ingest in requests of up to 1,000 quotes on average, over five minutes.",
                [
                    (f"operation:quotes_http_request_duration_seconds:{q}{{{JOB}}}", "{{operation}} " + q)
                    for q in ("p50", "p95", "p99")
                ],
                "s", width=12, lines=LATENCY,
            ),
            Panel(
                "Storage and compression",
                "Bytes with indexes by what holds them, and on the right how many times smaller the columnstore is.",
                [
                    (f"max by (state) (quotes_storage_bytes{{{INSTANCE}}})", "{{state}}"),
                    (f"job:timescaledb_compression:ratio{{{JOB}}}", "compression"),
                ],
                "bytes", width=12, stacked=True, right={"compression": "short"},
            ),
            Panel(
                "Health",
                "The checks of the service, whether it can look at its store, and whether it answers Prometheus.",
                [
                    (CHECKS, "{{check}}"),
                    (f"max(quotes_monitor_up{{{INSTANCE}}})", "monitor"),
                    (f"min(up{{{INSTANCE}}})", "every instance"),
                ],
                kind="state-timeline", width=12, states=HEALTHY,
            ),
        ),
    ),
    Row(
        "Ingest",
        (
            Panel(
                "Refused",
                "Requests refused as a whole by problem code, and rows refused one by one.",
                [
                    (_rate("quotes_ingest_rejected_requests_total", "reason"), "{{reason}}"),
                    (_rate("quotes_ingest_rows_total", "result", 'result="rejected"'), "rows"),
                ],
                "reqps", right={"rows": "rowsps"},
            ),
            Panel(
                "Quotes in a request and in a transaction",
                "Means: a transaction takes several requests under load.",
                [
                    (f"{_rate(f'quotes_{name}_sum', 'job')} / {_rate(f'quotes_{name}_count', 'job')}", legend)
                    for name, legend in (("ingest_batch_rows", "request"), ("writer_flush_rows", "transaction"))
                ],
            ),
            Panel(
                "Age on arrival",
                "From the newest timestamp of a batch to its arrival. Backfills are old by nature.",
                [(_quantile(q, "quotes_ingest_event_lag_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95)],
                "s",
            ),
            Panel(
                "Write queue",
                "Share of QUOTES_WRITER_QUEUE_ROWS that is taken.",
                [
                    (
                        f"quotes_writer_queue_rows{{{INSTANCE}}} / quotes_writer_queue_limit_rows{{{INSTANCE}}}",
                        "{{instance}}",
                    )
                ],
                "percentunit", lines=(Line("QuotesWriterQueueFilling"),),
            ),
            Panel(
                "Writer",
                "p95 of the wait of a request for its transaction, and of the transaction.",
                [
                    (_quantile(0.95, "quotes_writer_wait_seconds"), "wait"),
                    (_quantile(0.95, "quotes_writer_flush_seconds"), "transaction"),
                ],
                "s",
            ),
            Panel(
                "Late and crossed",
                "Rows more than an hour old when they arrived, and rows whose bid was above their ask.",
                [
                    (_rate("quotes_ingest_late_rows_total", "job"), "late"),
                    (_rate("quotes_ingest_crossed_rows_total", "job"), "crossed"),
                ],
                "rowsps",
            ),
            Panel(
                "Newest quote",
                "Its age.",
                [(f"job:quotes_freshness_seconds:min{{{JOB}}}", "{{job}}")],
                "s", lines=(Line("QuotesStale"),),
            ),
            Panel(
                "Bodies",
                "Bytes of request bodies.",
                [(_rate("quotes_http_request_body_bytes_sum", "job"), "received")],
                "Bps",
            ),
            Panel(
                "Clocks",
                "How far those of the service and of the database are apart; `/health` says which is ahead.",
                [(f"abs(quotes_clock_difference_seconds{{{INSTANCE}}})", "{{instance}}")],
                "s", lines=(Line("QuotesClockDifference"),),
            ),
        ),
    ),
    Row(
        "Queries",
        (
            Panel(
                "Requests",
                "By route.",
                [(_rate("quotes_http_requests_total", "method, handler"), "{{method}} {{handler}}")],
                "reqps",
            ),
            Panel(
                "p99 by route",
                "Routes without an objective too.",
                [
                    (
                        _quantile(0.99, "quotes_http_request_duration_seconds", "method, handler"),
                        "{{method}} {{handler}}",
                    )
                ],
                "s", lines=LATENCY,
            ),
            Panel(
                "Answers",
                "By status code.",
                [(_rate("quotes_http_requests_total", "code"), "{{code}}")],
                "reqps", stacked=True,
            ),
            Panel(
                "Errors",
                "Share of requests answered with 5xx over five minutes.",
                [(f"operation:quotes_http_errors:ratio5m{{{JOB}}}", "{{operation}}")],
                "percentunit", lines=(Line("QuotesErrorsHigh"),),
            ),
            Panel(
                "In progress",
                "Requests that were not answered yet.",
                [(f"quotes_http_requests_in_progress{{{INSTANCE}}}", "{{instance}}")],
            ),
            Panel(
                "Database errors",
                "Failed operations by class of SQLSTATE: `connection` lost or refused, `pool` none free in time.",
                [(_rate("quotes_db_errors_total", "sqlstate_class"), "{{sqlstate_class}}")],
                "ops",
            ),
            Panel(
                "Pools",
                "Share of the connections in use.",
                [(f"job_instance_role:quotes_db_pool_in_use:ratio{{{INSTANCE}}}", "{{instance}} {{role}}")],
                "percentunit", lines=(Line("QuotesPoolExhausted"),),
            ),
            Panel(
                "Wait for a connection",
                "p95.",
                [(_quantile(0.95, "quotes_db_pool_wait_seconds", "role"), "{{role}}")],
                "s",
            ),
            Panel(
                "Connections to PostgreSQL",
                "By state, of every client.",
                [('sum by (state) (pg_stat_activity_count{job="quotes-postgres"})', "{{state}}")],
            ),
        ),
    ),
    Row(
        "TimescaleDB",
        (
            Panel(
                "Chunks",
                "Of the raw quotes; `partial` ones got late rows and wait to be compressed.",
                [(f"max by (state) (timescaledb_hypertable_chunks{{{INSTANCE}}})", "{{state}}")],
                stacked=True, lines=(Line("QuotesChunksMany"),),
            ),
            Panel(
                "Compression",
                "How many times smaller the columnstore is than its rows were, with their indexes.",
                [(f"job:timescaledb_compression:ratio{{{JOB}}}", "{{job}}")],
                lines=(Line("QuotesCompressionLow", below=True),),
            ),
            Panel(
                "Size and space left",
                "Of the whole database. It stops when nothing is left.",
                [
                    (f"max(quotes_storage_size_bytes{{{INSTANCE}}})", "database"),
                    (f"min(quotes_storage_free_bytes{{{INSTANCE}}})", "left"),
                ],
                "bytes", stacked=True,
            ),
            Panel(
                "Rollups behind",
                "From what is materialised to the newest quote. Bars of the API are exact all the same.",
                [(f"max by (rollup) (timescaledb_cagg_watermark_lag_seconds{{{INSTANCE}}})", "{{rollup}}")],
                "s",
            ),
            Panel(
                "Stale ranges",
                "Ranges below a rollup's watermark that got late quotes and wait for a refresh.",
                [(f"max by (rollup) (timescaledb_cagg_stale_ranges{{{INSTANCE}}})", "{{rollup}}")],
            ),
            Panel(
                "Jobs: last run",
                "Whether it succeeded.",
                [(f"min by (job_name) (timescaledb_job_last_run_success{{{INSTANCE}}})", "{{job_name}}")],
                kind="state-timeline", states={"0": ("failed", "red"), "1": ("succeeded", "green")},
            ),
            Panel(
                "Jobs: intervals since the last success",
                "QuotesJobOverdue fires above three.",
                [
                    (
                        f"(time() - {_of_jobs(_SUCCESS)}) / {_of_jobs(_EVERY)}",
                        "{{job_name}}",
                    )
                ],
                lines=(Line("QuotesJobOverdue"),),
            ),
            Panel(
                "Newest backup",
                "Its age, of those in quotes.backups. Empty until there is one.",
                [(f"clamp_min(time() - max(quotes_backup_last_success_timestamp_seconds{{{INSTANCE}}}), 0)", "age")],
                "s", lines=(Line("QuotesBackupOld"),),
            ),
        ),
    ),
    Row(
        "Replicas",
        (
            Panel(
                "Lag",
                "Age of what a replica has replayed, at most; none while it cannot be used.",
                [(f"max by (replica) (quotes_replica_lag_seconds{{{INSTANCE}}})", "replica {{replica}}")],
                "s", width=12, lines=(Line("QuotesReplicaLagging"),),
            ),
            Panel(
                "Reads",
                "By the role of the server asked, and those that failed on a replica and ran on the primary.",
                [
                    (_rate("quotes_reads_total", "role"), "{{role}}"),
                    (_rate("quotes_read_retries_total", "job"), "repeated"),
                ],
                "reqps", width=12,
            ),
            Panel(
                "Servers that take writes",
                "Of those that the database URLs name. Where they name a single one, no line.",
                [(f"max by (job) (quotes_writable_servers{{{INSTANCE}}})", "{{job}}")],
                width=12, lines=(Line("QuotesTwoPrimaries"),),
            ),
            Panel(
                "WAL that slots retain",
                "On the primary, as postgres_exporter sees it. No slot, no line.",
                [('max by (slot_name) (pg_replication_slots_pg_wal_lsn_diff{job="quotes-postgres"})', "{{slot_name}}")],
                "bytes", width=12, lines=(Line("QuotesReplicationSlotRetainsWal"),),
            ),
        ),
    ),
    Row(
        "SLO: 99 % of requests without a 5xx, 99 % within 100 ms, over 30 days",
        tuple(
            panel
            for name, good, kind, total in (
                ("Error", "without a 5xx", "errors", "requests"),
                ("Latency", "within 100 ms", "slow", "timed"),
            )
            for panel in (
                Panel(
                    f"{name} budget left",
                    f"Of the 1 % of requests in 30 days that need not be {good}.",
                    [
                        (
                            f"1 - {_of_30_days(kind)} / ({_of_30_days(total)} > 0) / 0.01",
                            "{{operation}}",
                        )
                    ],
                    "percentunit", "stat", 8, 8,
                ),
                Panel(
                    f"{name} budget: burn rate",
                    "1 uses the budget up in 30 days. The lines are those of the four pairs of windows.",
                    [
                        (f"operation:quotes_http_{kind}:ratio{window}{{{JOB}}} / 0.01", f"{{{{operation}}}} {window}")
                        for window in ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
                    ],
                    width=16,
                    lines=tuple(
                        Line(f"Quotes{name}BudgetBurn", window, color=color)
                        for window, color in (("1h", "red"), ("6h", "red"), ("1d", "orange"), ("3d", "orange"))
                    ),
                ),
            )
        ),
    ),
)  # fmt: skip

# Where a range has more, its newest: a chart ends where the data end.
_BARS: Final = """
SELECT * FROM (
SELECT timestamp AS "time", open::float8, high::float8, low::float8, close::float8, volume::float8
FROM quotes.ohlc_$interval
WHERE symbol = ${symbol:sqlstring} AND $__timeFilter(timestamp) AND count > 0
ORDER BY timestamp DESC
LIMIT 20000
) AS newest ORDER BY "time"
""".strip()
_VWAP: Final = """
SELECT * FROM (
SELECT timestamp AS "time", (turnover / nullif(volume, 0))::float8 AS vwap, close::float8, mid_close::float8 AS mid
FROM quotes.ohlc_$interval
WHERE symbol = ${symbol:sqlstring} AND $__timeFilter(timestamp)
ORDER BY timestamp DESC
LIMIT 20000
) AS newest ORDER BY "time"
""".strip()
_COUNTS: Final = """
SELECT * FROM (
SELECT timestamp AS "time", count::float8 AS trades, mid_count::float8 AS "quotes with both sides"
FROM quotes.ohlc_$interval
WHERE symbol = ${symbol:sqlstring} AND $__timeFilter(timestamp)
ORDER BY timestamp DESC
LIMIT 20000
) AS newest ORDER BY "time"
""".strip()
_DAYS: Final = """
SELECT timestamp AS day, open::float8, high::float8, low::float8, close::float8, volume::float8, vwap::float8,
       count, change_percent::float8
FROM quotes.daily_summary
WHERE symbol = ${symbol:sqlstring} AND timestamp >= date_trunc('day', $__timeFrom()::timestamptz, 'UTC')
      AND timestamp <= $__timeTo()
ORDER BY timestamp DESC
LIMIT 1000
""".strip()

MARKET: Final = (
    Row(
        "Bars",
        (
            Panel(
                "$symbol, $interval",
                "Trades, from the rollups. Late ones show after the next refresh; GET /v1/ohlc has them at once.",
                [(_BARS, "")],
                kind="candlestick", width=24, height=14, table=True,
            ),
            Panel(
                "Close, VWAP and mid",
                "VWAP is turnover / volume of the bar's trades; mid is the last (bid + ask) / 2 of the bar.",
                [(_VWAP, "")], width=12, table=True,
            ),
            Panel("Trades and quotes in a bar", "How many made it.", [(_COUNTS, "")], width=12, table=True),
            Panel("Days", "Of the time range.", [(_DAYS, "")], kind="table", width=24, table=True),
        ),
    ),
)  # fmt: skip


def _symbols() -> dict[str, Any]:
    query = "SELECT symbol FROM quotes.latest ORDER BY symbol"
    return {
        "name": "symbol",
        "label": "Symbol",
        "type": "query",
        "datasource": POSTGRESQL,
        "query": query,
        "definition": query,
        "refresh": 2,
        "sort": 0,
        "multi": False,
        "includeAll": False,
    }


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by the name of its file."""
    return {
        "overview.json": dashboard(
            "opa-quotes-overview",
            "Quotes: overview",
            "Is the service well, and if not, where. Lines are the thresholds of the alerts.",
            OVERVIEW,
            [
                _datasource("prometheus"),
                _labels("job", "Job", "label_values(quotes_build_info, job)"),
                _labels("instance", "Instance", 'label_values(up{job=~"$job"}, instance)'),
            ],
            refresh="30s",
        ),
        "market.json": dashboard(
            "opa-quotes-market",
            "Quotes: market",
            "Bars as candlesticks, by SQL.",
            MARKET,
            [
                _datasource("grafana-postgresql-datasource"),
                _symbols(),
                _custom("interval", "Interval", ("1m", "1h", "1d")),
            ],
            refresh="1m",
        ),
    }


def text(document: dict[str, Any]) -> str:
    """A dashboard as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, document in dashboards().items():
        (DASHBOARDS / name).write_text(text(document))
