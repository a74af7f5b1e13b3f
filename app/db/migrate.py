"""Bring the schema to a revision, from the service, the CLI or a test.

Invariant: safe to call from any number of instances at once; they take turns and the work is done once.
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from app.db.failures import in_words, translated
from app.errors import QuotesError, StartupError
from app.settings import Settings


def _scripts() -> Path:
    """The migrations: beside the package in a checkout, inside it when installed."""
    installed = Path(__file__).parent / "alembic"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "alembic"


SCRIPTS: Final = _scripts()
_ONE_AT_A_TIME: Final = threading.Lock()  # alembic keeps its context in a global; the database has a lock of its own


def _config(url: str, settings: Settings) -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(url=url, settings=settings)
    return config


def head() -> str:
    """The newest revision."""
    return ScriptDirectory(str(SCRIPTS)).get_current_head() or ""


@functools.cache
def known() -> frozenset[str]:
    """All revisions that this version knows."""
    return frozenset(script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions())


def newer_schema(found: str, wanted: str) -> str:
    """What there is to say of a revision that this version does not know."""
    return (
        f"The schema is at revision {found}, which this version of the service does not know; it needs {wanted}."
        " Run the version that migrated it, or a newer one; if quotes.alembic_version is another application's, give"
        " the store a database of its own."
    )


async def migrate(url: str, settings: Settings, revision: str = "head") -> None:
    """Upgrade to `revision`; `base` or a lower one is reached by `downgrade`.

    Raises:
        DatabaseUnavailable: the server cannot be reached.
        StartupError: the revision is unknown or newer than this version of the service, or the server's
            capability level is below the required one.
    """
    await _run(command.upgrade, url, settings, revision)


async def downgrade(url: str, settings: Settings, revision: str = "base") -> None:
    """Downgrade to `revision`; at `base` nothing is left, stored quotes included.

    Raises:
        DatabaseUnavailable: the server cannot be reached.
        StartupError: the revision is unknown.
    """
    await _run(command.downgrade, url, settings, revision)


async def _run(step: Callable[[Config, str], None], url: str, settings: Settings, revision: str) -> None:
    if not revision:
        raise StartupError("Migration failed: a revision has a name, as `head`, `base` or one of the migrations.")
    config = _config(url, settings)

    def alone() -> None:
        with _ONE_AT_A_TIME:
            step(config, revision)

    # alembic/env.py runs its own event loop, which needs a thread of its own.
    try:
        with translated():
            await asyncio.to_thread(alone)
    except QuotesError as error:
        if told := in_words(error):
            raise told from error
        raise
    except CommandError as error:
        raise StartupError(f"Migration failed: {str(error).rstrip('.')}.") from error
