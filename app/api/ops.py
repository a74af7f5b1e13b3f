"""Operations: health for supervisors and people."""

from fastapi import APIRouter, Response

from app import workers
from app.api.deps import Wired, encoded

router = APIRouter(tags=["operations"])


@router.get("/health", response_model=None)
async def health(wired: Wired) -> Response:
    """All three checks: 200 when healthy or degraded, 503 when unhealthy."""
    report = await wired.health.report()
    return encoded(report.to_dict(), 503 if report.status == "unhealthy" else 200)


@router.get("/health/live", response_model=None)
async def live() -> Response:
    """Whether the process answers; touches nothing else."""
    return encoded({"status": "alive"})


@router.get("/health/ready", response_model=None)
async def ready(wired: Wired) -> Response:
    """Whether to send traffic here: 503 while unhealthy, or draining before a stop."""
    report = await wired.health.report()
    # One of several processes that is replaced says nothing of the others, who answer the next request.
    stopping = not wired.writer.accepting and not workers.others_stay()
    reason = "stopping" if stopping else "unhealthy" if report.status == "unhealthy" else "ready"
    return encoded({"status": reason}, 200 if reason == "ready" else 503)
