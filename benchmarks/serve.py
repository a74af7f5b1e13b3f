"""Serve another application by the very options of `python -m app serve`.

python -m benchmarks.serve MODULE:FACTORY --port 8001
"""

import sys
from typing import Any
from unittest.mock import patch

import uvicorn

from app import cli


def main() -> None:
    factory, *arguments = sys.argv[1:]
    run = uvicorn.run

    def run_factory(_: str, **options: Any) -> None:
        run(factory, **options)

    with patch.object(uvicorn, "run", run_factory):
        cli.app(["serve", *arguments])


if __name__ == "__main__":
    main()
