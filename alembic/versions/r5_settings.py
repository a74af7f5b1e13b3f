"""The settings of the store itself, and a retention that loses no bar.

What decides which quotes are kept belongs to the store: a process that thinks otherwise would acknowledge quotes that
are dropped. The built-in retention policy drops by age and asks nobody whether bars are complete, so a procedure of
our own takes its place; it also remembers up to where it has dropped, and keeps the first quotes of `quotes.latest`.
"""

from alembic import context, op
from sqlalchemy import text

from app.db.capability import Level

revision = "r5"
down_revision = "r4"
branch_labels = None
depends_on = None

COMMENTS = {
    "TABLE quotes.settings": "What belongs to the store, not to a process; changed by `opa-quotes maintain apply` only",
    "COLUMN quotes.settings.the_only_row": "True",
    "COLUMN quotes.settings.retention": "Age after which raw quotes are dropped; null where all are kept",
    "COLUMN quotes.settings.chunk_interval": "Time span of a chunk of raw quotes",
    "COLUMN quotes.settings.compress_after": "Age at which a chunk moves to the columnstore",
    "COLUMN quotes.settings.dropped_before": "Before this quotes were dropped whose bars stay; null where none were",
}

# First quotes of `quotes.latest` before a moment are moved to what is stored from there on, and symbols without any
# quote forgotten. Rows are locked in the order of writers, few at a time; what is looked for is looked for in steps
# that double, so that a symbol quoted daily costs the locks of few chunks.
MEND = """
CREATE PROCEDURE quotes.mend_first(moment timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    symbols text[];
    found text[];
    after text := '';
    low timestamptz;
    width interval;
BEGIN
    LOOP
        SELECT array_agg(symbol ORDER BY symbol) INTO symbols
        FROM (SELECT symbol FROM quotes.latest WHERE first_timestamp < moment AND symbol > after COLLATE "C"
              ORDER BY symbol LIMIT 200 FOR UPDATE) held;
        EXIT WHEN symbols IS NULL;
        after := symbols[cardinality(symbols)];
        low := moment;
        SELECT 8 * chunk_interval INTO width FROM quotes.settings;
        WHILE cardinality(symbols) > 0 AND low <= now() + interval '1 day' LOOP
            WITH moved AS (
                UPDATE quotes.latest held SET first_timestamp = oldest.timestamp, first_nanos = oldest.nanos
                FROM unnest(symbols) AS given (symbol)
                CROSS JOIN LATERAL (
                    SELECT timestamp, nanos FROM quotes.real_time stored
                    WHERE stored.symbol = given.symbol COLLATE "C"
                          AND stored.timestamp >= low AND stored.timestamp < low + width
                    ORDER BY stored.timestamp, stored.nanos LIMIT 1) oldest
                WHERE held.symbol = given.symbol COLLATE "C"
                RETURNING held.symbol)
            SELECT array_agg(symbol) INTO found FROM moved;
            SELECT coalesce(array_agg(symbol), '{}') INTO symbols
            FROM unnest(symbols) AS left_over (symbol) WHERE symbol <> ALL (coalesce(found, '{}'));
            low := low + width;
            width := 2 * width;
        END LOOP;
        DELETE FROM quotes.latest WHERE symbol = ANY (symbols) AND timestamp < moment;
        COMMIT;
    END LOOP;
END $$
"""

# Whether a rollup lacks something of a range: what was never refreshed is in its log from the beginning.
BEHIND = """
CREATE FUNCTION quotes.bars_behind(low timestamptz, high timestamptz) RETURNS boolean
LANGUAGE sql AS $$
WITH rollup AS (
    SELECT mat_hypertable_id AS id, raw_hypertable_id AS source FROM _timescaledb_catalog.continuous_agg
    WHERE user_view_schema = 'quotes'),
entry AS (
    SELECT lowest_modified_value AS first, greatest_modified_value AS last
    FROM _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log
    WHERE hypertable_id IN (SELECT source FROM rollup)
    UNION ALL
    SELECT lowest_modified_value, greatest_modified_value
    FROM _timescaledb_catalog.continuous_aggs_materialization_invalidation_log
    WHERE materialization_id IN (SELECT id FROM rollup)
    UNION ALL
    SELECT lowest_modified_value, greatest_modified_value
    FROM _timescaledb_catalog.continuous_aggs_materialization_ranges
    WHERE materialization_id IN (SELECT id FROM rollup))
SELECT EXISTS (SELECT FROM entry WHERE last >= _timescaledb_functions.to_unix_microseconds(low)
                                       AND first < _timescaledb_functions.to_unix_microseconds(high))
$$
"""

# A chunk below what was dropped has what came there since, not by the service: no bar can be built of it.
COMPLETE = """
            SELECT coalesce(low < dropped_before, false) INTO remnant FROM quotes.settings;
            IF NOT remnant AND quotes.bars_behind(first, last) THEN
                COMMIT;
                -- What a refresh changes is in the log of the next one when it is committed.
                CALL refresh_continuous_aggregate('quotes.ohlc_1m', low, high);
                COMMIT;
                CALL refresh_continuous_aggregate('quotes.ohlc_1h', low, high);
                COMMIT;
                CALL refresh_continuous_aggregate('quotes.ohlc_1d', low, high);
                COMMIT;
            END IF;
            -- Nothing is dropped that came meanwhile: the chunks are locked against writes before this is asked.
            EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', names);
            IF NOT remnant AND quotes.bars_behind(first, last) THEN
                RAISE EXCEPTION 'the bars from % to % are not complete, so that their quotes stay', low, high;
            END IF;
            UPDATE quotes.settings SET dropped_before = greatest(dropped_before, high);"""
KNOWN = """
    IF dropped IS NULL THEN
        SELECT dropped_before INTO dropped FROM quotes.settings;
    END IF;"""

# Whole days of UTC at once, since a day that lost one of its chunks has a bar that cannot be built again. A loop over a
# query would keep it open, and no refresh can commit beside it; so what comes next is asked for each time.
RETENTION = """
CREATE PROCEDURE quotes.apply_retention(job_id int, config jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    cutoff timestamptz;
    low timestamptz;
    high timestamptz;
    first timestamptz;
    last timestamptz;
    dropped timestamptz;
    names text;
    remnant boolean;
BEGIN
    SELECT date_trunc('day', now() - retention, 'UTC') INTO cutoff FROM quotes.settings;
    IF cutoff IS NOT NULL THEN
        PERFORM set_config('lock_timeout', '2s', false);
        LOOP
            SELECT date_trunc('day', range_start, 'UTC'),
                   date_trunc('day', range_end + interval '1 day' - interval '1 us', 'UTC')
            INTO low, high
            FROM timescaledb_information.chunks
            WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time' AND range_end <= cutoff
            ORDER BY range_start LIMIT 1;
            EXIT WHEN high IS NULL;
            SELECT string_agg(format('%I.%I', chunk_schema, chunk_name), ', '), min(range_start), max(range_end)
            INTO names, first, last
            FROM timescaledb_information.chunks
            WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time' AND range_end <= high;{complete}
            PERFORM drop_chunks('quotes.real_time', older_than => high);
            dropped := high;
            COMMIT;
        END LOOP;
    END IF;{known}
    IF dropped IS NOT NULL THEN
        CALL quotes.mend_first(dropped);
    END IF;
END $$
"""

DIMENSION = """
SELECT time_interval FROM timescaledb_information.dimensions
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
"""
POLICIES = """
SELECT (SELECT (config ->> 'drop_after')::interval FROM timescaledb_information.jobs
        WHERE hypertable_schema = 'quotes' AND proc_name = 'policy_retention'),
       (SELECT (config ->> 'compress_after')::interval FROM timescaledb_information.jobs
        WHERE hypertable_schema = 'quotes' AND proc_name = 'policy_compression')
"""
# Where quotes were dropped before, whatever the retention is now, their bars begin before the oldest chunk.
DROPPED = """
UPDATE quotes.settings SET dropped_before = oldest.start
FROM (SELECT min(range_start) AS start FROM timescaledb_information.chunks
      WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time') oldest
WHERE EXISTS (SELECT FROM quotes.ohlc_1d WHERE timestamp < oldest.start - interval '1 day')
"""


def retention_at(level: Level) -> str:
    """The procedure as a level needs it."""
    kept = {"{complete}": COMPLETE, "{known}": KNOWN}  # where there are bars that outlive their quotes
    statement = RETENTION
    for place, part in kept.items():
        statement = statement.replace(place, part if level >= Level.COMMUNITY else "")
    return statement


def upgrade() -> None:
    attributes = context.config.attributes
    level, settings = attributes["capability"].level, attributes["settings"]
    op.execute("""
        CREATE TABLE quotes.settings (
            the_only_row   boolean PRIMARY KEY DEFAULT true CHECK (the_only_row),
            retention      interval CHECK (retention > interval '0'),
            chunk_interval interval NOT NULL CHECK (chunk_interval > interval '0'),
            compress_after interval NOT NULL CHECK (compress_after > interval '0'),
            dropped_before timestamptz
        )""")
    for what, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON {what} IS '{meaning}'")
    # What the database does already is what holds, also where the environment has another opinion.
    connection = op.get_bind()
    retention, chunk, compress = settings.effective_retention, settings.chunk_interval, settings.compress_after
    if level >= Level.APACHE:
        chunk = connection.exec_driver_sql(DIMENSION).scalar_one()
    if level >= Level.COMMUNITY:
        retention, found = connection.exec_driver_sql(POLICIES).one()
        compress = found or compress
    connection.execute(
        text("INSERT INTO quotes.settings (retention, chunk_interval, compress_after) VALUES (:r, :c, :a)"),
        {"r": retention, "c": chunk, "a": compress},
    )
    op.execute(MEND)
    op.execute("COMMENT ON PROCEDURE quotes.mend_first IS 'Moves first quotes in latest to what is stored since'")
    if level >= Level.COMMUNITY:
        op.execute(BEHIND)
        op.execute("COMMENT ON FUNCTION quotes.bars_behind IS 'Whether a rollup lacks something of a range'")
        op.execute(DROPPED)
    if level >= Level.APACHE:
        op.execute(retention_at(level))
        op.execute("COMMENT ON PROCEDURE quotes.apply_retention IS 'Drops quotes past their retention; a job'")
    if level >= Level.COMMUNITY:
        op.execute("SELECT remove_retention_policy('quotes.real_time', if_exists => true)")
        op.execute("SELECT add_job('quotes.apply_retention', interval '1 hour', config => '{}')")


def downgrade() -> None:
    level = context.config.attributes["capability"].level
    if level >= Level.COMMUNITY:
        op.execute("""
            SELECT delete_job(job_id) FROM timescaledb_information.jobs
            WHERE proc_schema = 'quotes' AND proc_name = 'apply_retention'""")
        op.execute("""
            SELECT add_retention_policy('quotes.real_time', drop_after => retention)
            FROM quotes.settings WHERE retention IS NOT NULL""")
        op.execute("DROP FUNCTION quotes.bars_behind")
    if level >= Level.APACHE:
        op.execute("DROP PROCEDURE quotes.apply_retention")
    op.execute("DROP PROCEDURE quotes.mend_first")
    op.execute("DROP TABLE quotes.settings")
