"""`make matrix`: try every case, print what came of it, and exit with 1 where a promise was not kept."""

from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import typer

from app.db.embedded import embedded_postgres
from tests.chaos import running
from tests.chaos.reporting import Report, Skipped
from tests.matrix.cases import CASES, Case
from tests.matrix.trying import Server, pooled, run


async def _try(cases: list[Case], database_url: str | None, directory: Path, scale: float, seed: int) -> Report:
    del scale, seed
    if database_url is not None:
        return await run(Server(database_url, own=False), cases, "settings, the given server")
    async with embedded_postgres(directory / "server") as url:
        return await run(Server(url, own=True), cases, "settings")


async def _pool(mode: str, database_url: str | None, directory: Path, scale: float, seed: int) -> Report:
    del scale, seed
    try:
        if database_url is not None:
            return await pooled(Server(database_url, own=False), directory, mode)
        async with embedded_postgres(directory / "server") as url:
            return await pooled(Server(url, own=True), directory, mode)
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="settings, pgbouncer; all unless given.")] = None,
    *,
    only: Annotated[str, typer.Option(help="Only cases with these words in their name.")] = "",
    database_url: Annotated[
        str | None, typer.Option(help="A server of which this may use a superuser.", show_default="one of its own")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Set databases up in every way that administrators may, and see that the service is right or refuses them."""
    cases = [case for case in CASES if only in case.name]
    poolers = [partial(_pool, mode, database_url) for mode in ("session", "transaction", "statement")]
    scenarios = {"settings": [partial(_try, cases, database_url)], "pgbouncer": poolers}
    running.run(scenarios, parts or (), 1.0, 0, json_file)


if __name__ == "__main__":
    typer.run(main)
