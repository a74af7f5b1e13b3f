"""What is logged: one line an event whatever a client sends, with the request's id and without secrets."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import structlog
from fastapi import Request
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Scope

from app import logs
from app.main import app_from_environment, create_app
from app.settings import Settings
from tests.conftest import Lane, Serve, running

URL = "postgresql://writer:hunter2@127.0.0.1:1/none"


pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def written(capsys: pytest.CaptureFixture[str], how: str, value: str) -> str:
    logs.configure(Settings(_env_file=None, log_format=how))
    structlog.get_logger("app.test").info("seen", value=value, listed=[value])
    logging.getLogger("another").warning("said %s", value)
    return capsys.readouterr().err


@pytest.mark.parametrize("how", ["console", "json"])
def test_no_value_breaks_a_line_or_steers_a_terminal(capsys: pytest.CaptureFixture[str], how: str) -> None:
    colours = written(capsys, how, "plain").count("\x1b")

    @hypothesis.settings(deadline=None)
    @given(st.text() | st.sampled_from(["a\nb", "\x1b[2J", "\x9b2J", "\u2028x"]))
    def holds(value: str) -> None:
        text = written(capsys, how, value)
        assert len(text.splitlines()) == 2
        if how == "json":
            assert lines(text)[0]["value"] == value
            assert text.isascii()
        assert text.count("\x1b") == colours, "the renderer's own"
        for code in {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x202E} - {0x0A, 0x1B}:
            assert chr(code) not in text, value

    holds()


@pytest.mark.parametrize("how", ["console", "json"])
def test_a_traceback_forges_no_line_and_shows_no_variable(capsys: pytest.CaptureFixture[str], how: str) -> None:
    logs.configure(Settings(_env_file=None, log_format=how))

    def fail(password: str) -> None:
        assert password
        raise ValueError("one\n2026-11-22 [info] forged\x1b[2J")

    try:
        fail(URL)
    except ValueError:
        structlog.get_logger("app.test").exception("failed")
        logging.getLogger("another").exception("failed")
    text = capsys.readouterr().err
    assert "hunter2" not in text
    assert "\x1b[2J" not in text
    assert text.count("ValueError: one") == 2
    if how == "json":
        assert len(lines(text)) == 2
    else:
        assert [line for line in text.splitlines() if "forged" in line] == [
            line for line in text.splitlines() if line.startswith("    | ") and "forged" in line
        ]


async def answers(app: Any, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def test_the_id_of_a_request_is_in_its_header_its_problem_and_its_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings(_env_file=None, log_format="json")
    logs.configure(settings)
    app = create_app(settings)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("nothing foresaw this")

    given_id = await answers(app, "/v1/nowhere", x_request_id="client-7.a_b")
    assert given_id.headers["x-request-id"] == given_id.json()["request_id"] == "client-7.a_b"
    (line,) = lines(capsys.readouterr().err)
    assert line | {"ms": 0, "timestamp": ""} == {
        "event": "request", "logger": "app.access", "level": "info", "timestamp": "", "request_id": "client-7.a_b",
        "method": "GET", "path": "/v1/nowhere", "status": 404, "problem": "not-found", "ms": 0,
    }  # fmt: skip

    failed = await answers(app, "/broken")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal-error")
    name = failed.json()["request_id"]
    assert failed.headers["x-request-id"] == name
    found = lines(capsys.readouterr().err)
    assert [(line["event"], line["request_id"]) for line in found] == [("unexpected error", name), ("request", name)]
    assert "nothing foresaw this" in found[0]["exception"]


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 65, "über", "a b", "\x1b[31m", '"}'])
async def test_an_id_that_is_not_plain_is_replaced(capsys: pytest.CaptureFixture[str], name: str) -> None:
    settings = Settings(_env_file=None, log_format="json")
    logs.configure(settings)
    scope: Scope = {
        "type": "http", "method": "GET", "path": "/v1/x\r\n2026 forged", "query_string": b"", "root_path": "",
        "headers": [(b"x-request-id", name.encode())], "scheme": "http", "server": ("test", 80),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await create_app(settings)(scope, receive, send)
    own = dict(sent[0]["headers"])[b"x-request-id"].decode()
    assert len(own) == 16
    assert own.isalnum()
    (line,) = lines(capsys.readouterr().err)
    assert (line["request_id"], line["path"]) == (own, "/v1/x\r\n2026 forged")


async def test_half_an_answer_is_not_made_to_look_whole(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(_env_file=None, log_format="json")
    logs.configure(settings)
    app = create_app(settings)

    @app.get("/half")
    async def half(request: Request) -> StreamingResponse:
        async def parts() -> Any:
            yield b"first"
            raise RuntimeError("gone")

        return StreamingResponse(parts())

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises((RuntimeError, ExceptionGroup)):
            await client.get("/half")
    assert {line["event"] for line in lines(capsys.readouterr().err)} == {"unexpected error", "request"}


async def test_a_request_says_its_rows(lane: Lane, capsys: pytest.CaptureFixture[str], symbol: str) -> None:
    settings = lane.make_settings(log_format="json")
    async with running(create_app(settings)) as client:
        logs.configure(settings)
        rows = [{"symbol": symbol, "timestamp": f"2026-11-20T00:00:0{i}Z", "price": 1} for i in range(3)]
        await client.post("/v1/quotes", json=rows)
        await client.get("/v1/quotes", params={"symbols": symbol, "start": "2026-11-20", "limit": 2})
        await client.get("/health/live")
        found = [line for line in lines(capsys.readouterr().err) if line["logger"] == "app.access"]
    assert [(line["method"], line["path"], line["status"], line["rows"]) for line in found] == [
        ("POST", "/v1/quotes", 200, 3),
        ("GET", "/v1/quotes", 200, 2),
    ]
    assert all(line["ms"] > 0 for line in found)


@pytest.mark.parametrize("how", ["console", "json"])
def test_no_secret_is_logged_at_any_level(serve: Serve, shared_dir: Any, how: str) -> None:
    secrets = {
        "QUOTES_DATABASE_URL": URL, "QUOTES_ADMIN_TOKEN": "hunter2-admin", "QUOTES_PAGE_TOKEN_KEY": "hunter2-page",
        "QUOTES_LOG_LEVEL": "DEBUG", "QUOTES_LOG_FORMAT": how,
    }  # fmt: skip
    with serve(shared_dir / "unlogged", ready=False, **secrets) as refused:
        refused.process.wait(60)
    assert "cannot be reached" in refused.log.read_text()
    assert "hunter2" not in refused.log.read_text()
    del secrets["QUOTES_DATABASE_URL"]
    with serve(shared_dir / "unlogged", **secrets) as service:
        for token in ("hunter2-admin", "hunter2-other"):
            httpx.delete(
                f"{service.url}/v1/quotes", params={"symbol": "A", "start": "2026-01-01", "end": "2026-01-02"},
                headers={"authorization": f"Bearer {token}"}, timeout=30,
            )  # fmt: skip
        httpx.get(f"{service.url}/v1/quotes", params={"symbols": "A", "page_token": "hunter2"})
    text = service.log.read_text()
    assert "/v1/quotes" in text
    assert "hunter2" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_log_that_cannot_be_written_fails_nothing() -> None:
    code = (
        "import structlog; from app import logs; from app.settings import Settings;"
        "logs.configure(Settings(_env_file=None, log_format='json'));"
        "structlog.get_logger('x').error('a line', exc_info=ValueError('v')); print('went on')"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.stdout == b"went on\n"


def test_a_misspelt_setting_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("QUOTES_LOG_LEVLE=DEBUG\nOTHER=1\n")
    monkeypatch.setenv("QUOTES_RETENTOIN", "3 years")
    monkeypatch.setenv("QUOTES_LOG_FORMAT", "json")
    app_from_environment()
    told = [line for line in lines(capsys.readouterr().err) if line["event"] == "unknown setting"]
    assert {line["variable"]: line["nearest"] for line in told} == {
        "QUOTES_LOG_LEVLE": "QUOTES_LOG_LEVEL", "QUOTES_RETENTOIN": "QUOTES_RETENTION"
    }  # fmt: skip
    assert {line["level"] for line in told} == {"warning"}
