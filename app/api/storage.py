"""What the store occupies, how much the columnstore saves, and how far background work has come."""

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Query as QueryParameters
from pydantic import AwareDatetime, BaseModel, Field

from app import formats
from app.api.deps import Query, Wired, encoded
from app.api.problems import responses
from app.clock import rfc3339
from app.repository.storage import STATES, Chunk, Storage

router = APIRouter(prefix="/v1", tags=["operations"])


class RelationSize(BaseModel):
    """A table with its indexes, in bytes."""

    name: str
    kind: str
    bytes: int
    index_bytes: int
    rows_estimate: int | None


class Compression(BaseModel):
    """The compressed chunks, in bytes before and after."""

    before_bytes: int
    after_bytes: int
    ratio: float | None


class ChunkSize(BaseModel):
    """One chunk; `end` is exclusive.

    `locked_by` is the server process that keeps all others from it; its bytes are then those that were last counted.
    """

    name: str
    start: AwareDatetime
    end: AwareDatetime
    state: str
    bytes: int
    before_bytes: int | None
    after_bytes: int | None
    ratio: float | None
    locked_by: int | None


class ChunkList(BaseModel):
    """Chunks by state, and the newest of them."""

    total: int
    by_state: dict[str, int]
    newest: list[ChunkSize]


class RollupState(BaseModel):
    """How far a rollup is materialised; quotes past that are in the bars all the same."""

    name: str
    watermark: AwareDatetime | None
    lag_seconds: float = Field(description="From the watermark to the newest quote.")
    stale_ranges: int = Field(description="Ranges below the watermark that wait for a refresh.")


class JobState(BaseModel):
    """A background job and its last run."""

    name: str
    id: int
    scheduled: bool
    every_seconds: float
    last_run_started: AwareDatetime | None
    last_success: AwareDatetime | None
    last_run_status: str | None
    total_runs: int
    total_failures: int
    next_start: AwareDatetime | None


class StorageReport(BaseModel):
    """One look at the store, at most ten seconds old."""

    level: str
    postgresql: str
    timescaledb: str | None
    tables: list[RelationSize]
    compression: Compression
    chunks: ChunkList
    rollups: list[RollupState]
    jobs: list[JobState]


class StorageQuery(Query):
    """Parameters of the storage report."""

    limit: int = Field(default=100, ge=0, le=10_000, description="Most chunks listed, newest first.")


@router.get("/storage", response_model=StorageReport, responses=responses(400, 406, 503))
async def get_storage(request: Request, query: Annotated[StorageQuery, QueryParameters()], wired: Wired) -> Response:
    """Sizes, savings by chunk, watermarks of the rollups, and the background jobs with their last runs."""
    formats.writer(request.headers.get("accept"))
    return encoded(report(await wired.monitor.storage(), query.limit))


def report(look: Storage, limit: int) -> dict[str, Any]:
    """A look as in the JSON answer, with the newest chunks."""
    return {
        "level": str(look.capability.level),
        "postgresql": look.capability.postgresql,
        "timescaledb": look.capability.timescaledb,
        "tables": [
            {"name": r.name, "kind": r.kind, "bytes": r.bytes, "index_bytes": r.index_bytes, "rows_estimate": r.rows}
            for r in look.relations
        ],
        "compression": {"before_bytes": look.before, "after_bytes": look.after, "ratio": look.ratio},
        "chunks": {
            "total": len(look.chunks),
            "by_state": {state: look.count(state) for state in STATES},
            "newest": [_chunk(chunk) for chunk in sorted(look.chunks, key=lambda c: c.start, reverse=True)[:limit]],
        },
        "rollups": [
            {
                "name": r.name,
                "watermark": None if r.watermark is None else rfc3339(r.watermark),
                "lag_seconds": r.lag / timedelta(seconds=1),
                "stale_ranges": r.stale_ranges,
            }
            for r in look.rollups
        ],
        "jobs": [
            {
                "name": j.name,
                "id": j.id,
                "scheduled": j.scheduled,
                "every_seconds": j.every.total_seconds(),
                "last_run_started": None if j.last_started is None else rfc3339(j.last_started),
                "last_success": None if j.last_success is None else rfc3339(j.last_success),
                "last_run_status": j.last_status,
                "total_runs": j.runs,
                "total_failures": j.failures,
                "next_start": None if j.next_start is None else rfc3339(j.next_start),
            }
            for j in look.jobs
        ],
    }


def _chunk(chunk: Chunk) -> dict[str, Any]:
    return {
        "name": chunk.name,
        "start": rfc3339(chunk.start),
        "end": rfc3339(chunk.end),
        "state": chunk.state,
        "bytes": chunk.bytes,
        "before_bytes": chunk.before,
        "after_bytes": chunk.after,
        "ratio": round(chunk.before / chunk.after, 2) if chunk.before and chunk.after else None,
        "locked_by": chunk.locked_by,
    }
