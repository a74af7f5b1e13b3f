"""A volume that fills up under ingest, and gets room again."""

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.chaos.kills import Victim, started
from tests.chaos.recording import Ledger, Writers, fleet, until
from tests.chaos.reporting import Report, Skipped
from tests.chaos.verifying import verify

_SIZE: Final = 900 * 2**20
#: What is left for quotes until the ballast is thrown off.
_ROOM: Final = 150 * 2**20
_WRITERS: Final = 4
#: Seconds without an acknowledgement after which the volume counts as full.
_SILENCE: Final = 3.0
_PATIENCE: Final = 60.0


@contextmanager
def volume(path: Path, size: int) -> Iterator[Path]:
    """A file system of its own in memory.

    Raises:
        Skipped: this process may not mount one.
    """
    path.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(path)],  # noqa: S607
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped("no file system can be mounted here") from error
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)  # noqa: S607


def _free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


async def filled(victim: Victim, directory: Path, *, logs: bool = False) -> Report:
    """Write until the volume is full, wait, make room, and wait until quotes are taken again.

    With `logs` the service logs to the same volume.
    """
    report = Report(f"disk full: {victim}{' and logs' if logs else ''}")
    ledger = Ledger()
    with ExitStack() as stack:
        disk = stack.enter_context(volume(directory / "volume", _SIZE))
        target = await asyncio.to_thread(started, stack, [victim], disk, logs=None if logs else directory)
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(_free(disk) - _ROOM, 1))
        with target.supervised():
            async with Writers([*fleet(ledger, [target.service.url], _WRITERS, patience=0.5)]) as writers:

                def silent() -> bool:
                    last = ledger.acknowledged[-1][1] if ledger.acknowledged else time.monotonic()
                    return time.monotonic() - last > _SILENCE

                full = await until(lambda: silent() or not writers.running, 300)
                report.require(full, "the volume did not fill up")
                left = _free(disk)
                await asyncio.sleep(_SILENCE)
                ballast.unlink()
                room = time.monotonic()
                recovery = await ledger.recovery(room, _PATIENCE)
        if recovery is None:
            report.broken.append(f"no acknowledgement within {_PATIENCE:g} s of there being room")
            await asyncio.to_thread(target.by_hand)
        verdict = await verify(ledger, target.database_url, target.service.url)
    report.broken += verdict.broken
    report.figures = {
        "rows": verdict.rows,
        "lost": verdict.lost,
        "torn": verdict.torn,
        "unknown": f"{verdict.unknown}, {verdict.unknown_stored} of them stored",
        "bytes free when full": left,
        "taken again after s": None if recovery is None else round(recovery, 2),
        "answers": dict(ledger.answers.most_common()),
    }
    return report
