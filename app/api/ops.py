"""Operations: health for supervisors and people."""

from fastapi import APIRouter, Response

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
    is_ready = wired.writer.accepting and report.status != "unhealthy"
    reason = "ready" if is_ready else "unhealthy" if wired.writer.accepting else "stopping"
    return encoded({"status": reason}, 200 if is_ready else 503)
