"""`make hostile`: run attacks, print what they found, and exit with 1 if a promise was not kept."""

from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from tests.chaos import running
from tests.chaos.reporting import Report
from tests.chaos.running import Scenario
from tests.hostile import bodies, connections, faults, fuzzing, overload, requests
from tests.hostile.striking import Attack, strike

ATTACKS: Final[dict[str, list[Attack]]] = {
    "bodies": bodies.ATTACKS,
    "requests": requests.ATTACKS,
    "connections": connections.ATTACKS,
    "fuzz": fuzzing.ATTACKS,
    "overload": overload.ATTACKS,
}
_PROXIED: Final = {
    "clients": faults.before_service,
    "database": faults.before_database,
}


async def _strike(attack: Attack, keep: Path | None, directory: Path, scale: float, seed: int) -> Report:
    return await strike(directory, [attack], scale=scale, seed=seed, keep=keep)


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join((*ATTACKS, *_PROXIED))}; all unless given.")
    ] = None,
    *,
    only: Annotated[str, typer.Option(help="Only attacks with these words in their name.")] = "",
    scale: Annotated[float, typer.Option(min=0.001, help="Part of the full size.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of what is random.", show_default="the time")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Directory for the requests that were answered wrongly.")] = None,
) -> None:
    """Attack the service in every way that a client, a network or a crowd can, and measure what others notice of it."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    scenarios: dict[str, list[Scenario]] = {
        part: [partial(_strike, attack, keep) for attack in attacks if only in attack.name]
        for part, attacks in ATTACKS.items()
    }
    for part, scenario in _PROXIED.items():
        scenarios[part] = [partial(scenario, fault) for fault in faults.FAULTS if only in fault]
    running.run(scenarios, parts or (), scale, seed, json_file)


if __name__ == "__main__":
    typer.run(main)
