"""The service with one more route, which reads a body and answers `{}`: what a POST costs before anything is done."""

from fastapi import FastAPI, Request, Response

from app.main import app_from_environment


def create() -> FastAPI:
    """The service by the environment's settings, and `POST /empty`."""
    app = app_from_environment()

    @app.post("/empty")
    async def empty(request: Request) -> Response:
        await request.body()
        return Response(b"{}", media_type="application/json")

    return app
