"""A real Prometheus, Alertmanager and postgres_exporter for tests, on the rules of the project with shorter windows.

Invariant: the rules are those of prometheus/rules, with range windows divided by `RANGES`, `for` divided by `HOLDS`,
and nothing else changed; what they say at their real windows is tested by promtool.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from grafana.build import ROOT
from tests.conftest import free_port

#: 5 minutes become 4 seconds, which are eight scrapes.
RANGES: Final = 75
#: 5 minutes become 2 seconds, which are four evaluations.
HOLDS: Final = 150
RULES: Final = sorted((ROOT / "prometheus" / "rules").glob("*.yml"))
#: Where the Makefile unpacks Debian's packages.
UNPACKED: Final = ROOT / ".venv" / "prometheus" / "usr" / "bin"
#: Where Debian's Alertmanager looks for its templates.
TEMPLATES: Final = Path("/usr/share/prometheus/alertmanager")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_METRIC: Final = re.compile(r"\b(?:(?:operation|job)[a-z_]*:)?(?:quotes|timescaledb|pg)_[a-z0-9_:]+")


PROGRAMS: Final = ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "prometheus-postgres-exporter")


def program(name: str) -> str:
    """A program of Debian's packages; skips where it is missing, fails there on CI."""
    found = shutil.which(name, path=f"{UNPACKED}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return found


def alertmanager(directory: Path) -> str:
    """Alertmanager, to be started in the directory.

    Debian's reads templates from where its package puts them. Where that is only unpacked, a copy of the program reads
    them from the directory: the place is a constant in it, for which another of the same length may stand.
    """
    command = program("prometheus-alertmanager")
    if TEMPLATES.exists():
        return command
    copy, there = (
        directory / "alertmanager.bin",
        b"." + b"/" * (len(bytes(TEMPLATES)) - len("templates") - 1) + b"templates",
    )
    copy.write_bytes(Path(command).read_bytes().replace(bytes(TEMPLATES), there))
    copy.chmod(0o755)
    (directory / "templates").symlink_to(UNPACKED.parent / TEMPLATES.relative_to("/usr"))
    return str(copy)


@cache
def rules() -> list[dict[str, Any]]:
    """Every rule, recording or alerting, not to be changed."""
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics that an expression asks for, recorded ones included."""
    return set(_METRIC.findall(re.sub(r'"[^"]*"', '""', expression)))


def faster(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule with shorter windows, of at least a second."""

    def shorter(match: re.Match[str], divisor: int) -> str:
        return f"{max(1, int(match[1]) * _SECONDS[match[2]] // divisor)}s"

    changed = rule | {"expr": re.sub(r"(?<=\[)(\d+)([smhd])(?=\])", partial(shorter, divisor=RANGES), rule["expr"])}
    if "for" in rule:
        changed["for"] = re.sub(r"^(\d+)([smhd])$", partial(shorter, divisor=HOLDS), rule["for"])
    return changed


@contextmanager
def started(command: list[str], log: Path, ready: str, **environment: str) -> Iterator[None]:
    """A program that runs until the end of the block, once `ready` answers 200."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, cwd=log.parent
        )
    try:
        wait_until(lambda: _answers(ready) or process.poll() is not None, 20)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(reached: Callable[[], object], seconds: float, otherwise: Callable[[], object] = lambda: "") -> None:
    """Return when `reached()` holds.

    Raises:
        AssertionError: it did not within `seconds`; `otherwise` tells what there is instead.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds} s; {otherwise()}"
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server that scrapes and evaluates twice a second."""

    url: str
    #: The targets of the job `quotes`, which it watches.
    targets: Path
    alertmanager: str | None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query that are a number."""
        answer = httpx.post(f"{self.url}/api/v1/query", data={"query": expression}, timeout=20).json()
        assert answer["status"] == "success", (expression, answer)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return [series for series in result if series["value"][1] != "NaN"]

    def firing(self) -> set[str]:
        """The alerts that fire, those of burn rates with their window; none of their annotations failed to expand."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=5).json()["data"]["alerts"]
        assert "error expanding" not in str(alerts)
        return {
            " ".join(alert["labels"][name] for name in ("alertname", "window") if name in alert["labels"])
            for alert in alerts
            if alert["state"] == "firing"
        }

    def wait_firing(self, names: set[str]) -> None:
        """Return when all of these fire."""
        wait_until(lambda: names <= self.firing(), 60, lambda: f"{names - self.firing()} do not fire")

    def wait_quiet(self, names: set[str]) -> None:
        """Return when none of these fires."""
        wait_until(lambda: not names & self.firing(), 60, lambda: f"{names & self.firing()} fire")

    def wait_series(self, expression: str) -> None:
        """Return when a query has a result."""
        wait_until(lambda: self.query(expression), 20, lambda: f"nothing from {expression}")

    def notified(self) -> set[str]:
        """The alerts that Alertmanager has and does not hold back for another one."""
        assert self.alertmanager is not None
        answer = httpx.get(f"{self.alertmanager}/api/v2/alerts", params={"inhibited": "false"}, timeout=5)
        return {alert["labels"]["alertname"] for alert in answer.json()}


def write_targets(path: Path, *addresses: str) -> None:
    """Name the targets of a job, in one step as file discovery wants it."""
    draft = path.with_suffix(".new")
    draft.write_text(yaml.safe_dump([{"targets": list(addresses)}] if addresses else []))
    draft.replace(path)


@contextmanager
def prometheus(
    directory: Path, *targets: str, exporter: str | None = None, alerting: bool = False, **config: Any
) -> Iterator[Prometheus]:
    """Prometheus, and where `alerting` an Alertmanager that it tells; `config` adds to the configuration."""
    directory.mkdir(parents=True)
    found = directory / "targets.yml"
    write_targets(found, *targets)
    for file in RULES:
        document = yaml.safe_load(file.read_text())
        for group in document["groups"]:
            group["rules"] = [faster(rule) for rule in group["rules"]]
        (directory / file.name).write_text(yaml.safe_dump(document))
    port, alertmanager_port = free_port(), free_port()
    # The project's own configuration, but for paces, addresses and paths.
    document = yaml.safe_load((ROOT / "prometheus" / "prometheus.yml").read_text())
    document["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    document["rule_files"] = [file.name for file in RULES]
    scrapes = {scrape["job_name"]: scrape for scrape in document["scrape_configs"]}
    scrapes["quotes"]["file_sd_configs"][0] |= {"files": [found.name], "refresh_interval": "1s"}
    scrapes["quotes-postgres"]["static_configs"] = [{"targets": [exporter] if exporter else []}]
    document["scrape_configs"] = [scrapes["quotes"], scrapes["quotes-postgres"]]
    document["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager_port}"]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(document | config))
    command = [
        program("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--web.enable-remote-write-receiver",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with started(command, directory / "prometheus.log", f"{url}/-/ready"):
        if not alerting:
            yield Prometheus(url, found, None)
            return
        command = [
            alertmanager(directory), f"--config.file={ROOT / 'prometheus' / 'alertmanager.yml'}",
            "--storage.path=alertmanager", f"--web.listen-address=127.0.0.1:{alertmanager_port}",
            "--cluster.listen-address=", "--log.level=warn",
        ]  # fmt: skip
        told = f"http://127.0.0.1:{alertmanager_port}"
        with started(command, directory / "alertmanager.log", f"{told}/-/ready"):
            yield Prometheus(url, found, told)


@contextmanager
def postgres_exporter(directory: Path, dsn: str) -> Iterator[str]:
    """The address of an exporter of the server of a `key=value` connection string."""
    directory.mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus-postgres-exporter"), f"--web.listen-address={address}"]
    with started(command, directory / "exporter.log", f"http://{address}/", DATA_SOURCE_NAME=dsn):
        yield address
