"""The migrated catalog equals the snapshot of its capability level: tables, comments, indexes, policies, jobs.

Invariant: a snapshot names nothing that differs between two servers of a level: no ids, versions or generated
names. `UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py` rewrites the snapshots of the levels that ran;
the difference then belongs to the migration's review.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Final

import pytest

from app.db.capability import Level
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from tests.conftest import Lane

GOLDEN: Final = Path(__file__).parent / "golden"
COLUMNS: Final = """
SELECT c.relname::text AS relation, a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
       || CASE WHEN l.collname <> 'default' THEN ' COLLATE ' || l.collname ELSE '' END
       || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
       || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_collation l ON l.oid = a.attcollation LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'quotes'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p') ORDER BY c.relname, a.attnum
"""
RELATIONS: Final = """
SELECT c.relname::text, CASE c.relkind WHEN 'r' THEN 'table' WHEN 'v' THEN 'view' ELSE c.relkind::text END,
       c.reloptions, CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid, true) END,
       ARRAY(SELECT indexdef FROM pg_indexes i WHERE i.schemaname = 'quotes' AND i.tablename = c.relname ORDER BY 1),
       ARRAY(SELECT conname || ' ' || pg_get_constraintdef(k.oid) FROM pg_constraint k
             WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'f', 'c', 'x') ORDER BY 1),
       ARRAY(SELECT tgname::text FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT tgisinternal
             AND tgname NOT LIKE 'ts_%' ORDER BY 1), obj_description(c.oid, 'pg_class')
FROM pg_class c WHERE c.relnamespace = 'quotes'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p') ORDER BY 1
"""
COMMENTS: Final = """
SELECT c.relname::text, a.attname::text, col_description(c.oid, a.attnum)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'quotes'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p') ORDER BY c.relname, a.attnum
"""
FUNCTIONS: Final = """
SELECT oid::regprocedure::text, pg_get_functiondef(oid), obj_description(oid, 'pg_proc')
FROM pg_proc WHERE pronamespace = 'quotes'::regnamespace ORDER BY 1
"""
HYPERTABLES: Final = """
SELECT hypertable_name::text, column_name::text, time_interval::text FROM timescaledb_information.dimensions
WHERE hypertable_schema = 'quotes' ORDER BY 1, dimension_number
"""
AGGREGATES: Final = """
SELECT view_name::text, materialized_only, compression_enabled, view_definition
FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'quotes' ORDER BY 1
"""
COLUMNSTORE: Final = """
SELECT hypertable::text, segmentby::text, orderby::text FROM timescaledb_information.hypertable_columnstore_settings
WHERE hypertable::text LIKE 'quotes.%' ORDER BY 1
"""
JOBS: Final = """
SELECT j.proc_name::text, coalesce(c.view_name, j.hypertable_name)::text AS relation, j.schedule_interval::text,
       j.fixed_schedule, j.scheduled, j.max_retries, (j.config - 'hypertable_id' - 'mat_hypertable_id')::text AS config
FROM timescaledb_information.jobs j LEFT JOIN timescaledb_information.continuous_aggregates c
ON c.materialization_hypertable_name = j.hypertable_name WHERE j.job_id >= 1000 ORDER BY 1, 2
"""


async def snapshot(connection: Connection, level: Level) -> dict[str, Any]:
    """What the migrations made, by name."""
    columns: dict[str, list[str]] = {}
    for relation, column in await connection.fetch(COLUMNS):
        columns.setdefault(relation, []).append(column)
    comments: dict[str, dict[str, str]] = {}
    for relation, column, comment in await connection.fetch(COMMENTS):
        comments.setdefault(relation, {})[column] = comment
    aggregates = {}
    if level >= Level.COMMUNITY:
        aggregates = {
            row[0]: {"materialized_only": row[1], "columnstore": row[2], "definition": _lines(row[3])}
            for row in await connection.fetch(AGGREGATES)
        }
    relations = {}
    for name, kind, options, definition, indexes, constraints, triggers, comment in await connection.fetch(RELATIONS):
        entry = {
            "kind": "aggregate" if name in aggregates else kind,
            "columns": columns[name],
            "options": options,
            # The view that TimescaleDB generates names its own tables; what was written is listed below.
            "definition": None if name in aggregates or definition is None else _lines(definition),
            "indexes": indexes,
            "constraints": constraints,
            "triggers": triggers,
            "comment": comment,
            "comments": comments[name],
        }
        relations[name] = {key: value for key, value in entry.items() if value}
    functions = {
        name: {"definition": _lines(definition), "comment": comment}
        for name, definition, comment in await connection.fetch(FUNCTIONS)
    }
    found: dict[str, Any] = {"relations": relations, "functions": functions}
    if level >= Level.APACHE:
        found["hypertables"] = [list(row) for row in await connection.fetch(HYPERTABLES)]
    if level >= Level.COMMUNITY:
        found["aggregates"] = aggregates
        found["columnstore"] = [list(row) for row in await connection.fetch(COLUMNSTORE)]
        jobs = [dict(row) for row in await connection.fetch(JOBS)]
        found["jobs"] = [{**job, "config": json.loads(job["config"])} for job in jobs]
    return found


def _lines(definition: str) -> list[str]:
    """One line of SQL each, without what the versions of PostgreSQL indent and qualify differently."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in definition.strip().splitlines()]
    return [re.sub(r"\b(?:real_time|ohlc_1[mhd]|bars)\.(\"?\w+)", r"\1", line) for line in lines if line]


@pytest.mark.parametrize("retention", [None, "2 years"], ids=["kept", "two-years"])
async def test_the_catalog_is_the_golden_one(lane: Lane, empty_url: str, retention: str | None) -> None:
    settings = lane.make_settings(retention=retention)
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    await database.connect()
    level = database.capability.level
    async with database.dedicated() as connection:
        await connection.execute("SET search_path = public")  # by which names are shown with their schema, or without
        found = await snapshot(connection, level)
    await database.close()
    if retention and level < Level.COMMUNITY:
        golden = GOLDEN / f"{level}.json"  # without policies the setting changes nothing in the catalog
    else:
        golden = GOLDEN / (f"{level}-retention.json" if retention else f"{level}.json")
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "run with UPDATE_GOLDEN=1 and review the difference"
