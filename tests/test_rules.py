"""Rules, dashboards, runbooks and compose files agree with each other and with the metrics of the service."""

import json
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.main import create_app
from app.metrics import REGISTRY
from app.settings import Settings
from grafana.build import (
    DASHBOARDS,
    MARKET,
    OVERVIEW,
    POSTGRESQL,
    PROMETHEUS,
    ROOT,
    Row,
    alerts,
    dashboards,
    text,
    threshold,
)
from tests.prometheus import metrics_in, program, rules

RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
CASES = sorted((ROOT / "prometheus" / "tests").glob("*.yml"))
#: Of postgres_exporter, by its own default collectors.
FROM_EXPORTER = {"pg_up", "pg_replication_slots_pg_wal_lsn_diff", "pg_stat_activity_count"}
PANELS = [panel for document in dashboards().values() for panel in document["panels"] if panel["type"] != "row"]


def run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([program(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_prometheus_accepts_its_configuration_and_those_for_a_central_one() -> None:
    run("promtool", "check", "config", ROOT / "prometheus" / "prometheus.yml")
    for file in (ROOT / "prometheus" / "central").glob("*.yml"):
        run("promtool", "check", "config", file)
    assert "SUCCESS" in run("promtool", "check", "rules", *sorted((ROOT / "prometheus" / "rules").glob("*.yml")))


def test_alertmanager_accepts_its_configuration() -> None:
    run("amtool", "check-config", ROOT / "prometheus" / "alertmanager.yml")


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_cases(file: Path) -> None:
    run("promtool", "test", "rules", file)


@cache
def _asserted() -> dict[tuple[str, str], set[str]]:
    """Which of `fires` and `is quiet` the cases assert, by alert and window."""
    windows: dict[str, set[str]] = defaultdict(set)
    for rule in alerts():
        windows[rule["alert"]].add(rule["labels"].get("window", ""))
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file in CASES:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for check in case["promql_expr_test"]:
                for sample in check["exp_samples"]:
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))
                    if labels.get("alertstate") == "firing":
                        found[labels["alertname"], labels.get("window", "")].add("fires")
                if check["exp_samples"]:
                    continue
                labels = dict(re.findall(r'(\w+)="([^"]*)"', check["expr"]))
                if "alertname" in labels and "alertstate" not in labels:
                    for window in [labels["window"]] if "window" in labels else windows[labels["alertname"]]:
                        found[labels["alertname"], window].add("is quiet")
    return found


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"] + rule["labels"].get("window", ""))
def test_every_alert_has_both_cases_a_runbook_and_its_threshold(rule: dict[str, Any]) -> None:
    name = rule["alert"]
    assert _asserted()[name, rule["labels"].get("window", "")] == {"fires", "is quiet"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name}"
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOKS, re.DOTALL | re.MULTILINE)
    assert section is not None
    assert "```promql" in section[1], "the query to run"
    assert "```sh" in section[1] or "```sql" in section[1], "the command that mends"
    if "threshold" in rule["annotations"]:
        number = re.escape(rule["annotations"]["threshold"])
        # The burn rate of 1 is the budget itself.
        assert re.search(rf"[<>]\s*{number}(?![\d.])", rule["expr"]) or (number == "1" and "> 0.01" in rule["expr"])


def test_every_runbook_is_of_an_alert() -> None:
    assert set(re.findall(r"^## (Quotes\w+)", RUNBOOKS, re.MULTILINE)) == {rule["alert"] for rule in alerts()}


def test_every_metric_is_declared_recorded_or_of_the_exporter() -> None:
    declared = {
        name
        for collector, names in REGISTRY._collector_to_names.items()
        if getattr(collector, "_name", "").startswith(("quotes_", "timescaledb_"))
        for name in names
    }
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queries = [target["expr"] for panel in PANELS for target in panel["targets"] if "expr" in target]
    asked = set().union(*(metrics_in(expression) for expression in [*queries, *(rule["expr"] for rule in rules())]))
    assert asked - recorded - declared == FROM_EXPORTER
    # What is recorded is used.
    assert recorded <= asked


def test_every_route_is_of_one_operation() -> None:
    """A new route below /v1 that stores by POST, or reads by it, needs a place in recording.yml."""
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]
    posts = {path for path, operations in paths.items() if "post" in operations}
    assert posts == {"/v1/quotes"}
    assert {path for path in paths if path.startswith("/v1/")} >= {"/v1/storage"}


def test_the_committed_dashboards_are_what_the_code_builds() -> None:
    built = dashboards()
    assert {file.name for file in DASHBOARDS.glob("*.json")} == set(built)
    for name, document in built.items():
        assert (DASHBOARDS / name).read_text() == text(document), "run `python -m grafana.build`"


def test_the_lines_of_panels_are_the_alerts_thresholds() -> None:
    rows: tuple[Row, ...] = OVERVIEW + MARKET
    by_title = {panel["title"]: panel for panel in PANELS}
    used = set()
    for panel in (panel for row in rows for panel in row.panels):
        for line in panel.lines:
            used.add((line.alert, line.window))
            steps = by_title[panel.title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert threshold(line.alert, line.window) in [step["value"] for step in steps]
    # Every alert with a number has a panel that shows it.
    shown_with_p99 = ("QuotesLatencyP95High", None)
    by_a_stat = ("QuotesStorageFillingUp", None)
    assert {
        (rule["alert"], rule["labels"].get("window")) for rule in alerts() if "threshold" in rule["annotations"]
    } - used == {shown_with_p99, by_a_stat}


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_a_dashboard_is_well_formed(name: str) -> None:
    document = json.loads((DASHBOARDS / name).read_text())
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] in (PROMETHEUS, POSTGRESQL)
            assert panel["targets"]
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    assert document["templating"]["list"][0]["type"] == "datasource"
    written = json.dumps(panels)
    assert not re.search(r"\[\d+[smh]\]", written), "a rate over a fixed range instead of $__rate_interval"
    variables = {variable["name"] for variable in document["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", written)) <= variables | {"__rate_interval"}


def test_what_grafana_is_given_exists() -> None:
    provisioning = ROOT / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "quotes.yml").read_text())["datasources"]
    assert {source["type"] for source in sources} == {PROMETHEUS["type"], POSTGRESQL["type"], "alertmanager"}
    services = set(COMPOSE["services"])
    for source in sources:
        assert re.sub(r"^http://|:\d+$", "", source["url"]) in services
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "quotes.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_a_container_is_pinned_limited_and_watched(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.search(r":(v?\d+\.\d+|local$)", service["image"]), "not pinned"
    assert service["healthcheck"]["test"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["cpus"]
    assert limits["memory"]
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), port
    for variable, value in service.get("environment", {}).items():
        if "PASS" in variable:
            assert re.match(r"\$\{\w+:[?-]", value), "a default password"
    if name not in {"db", "api"}:
        assert service.get("read_only") or name.startswith("replica")


def test_scraped_addresses_are_containers() -> None:
    config = yaml.safe_load((ROOT / "prometheus" / "prometheus.yml").read_text())
    groups = [group for scrape in config["scrape_configs"] for group in scrape.get("static_configs", ())]
    groups += yaml.safe_load((ROOT / "prometheus" / "targets" / "quotes.yml").read_text())
    hosts = {target.split(":")[0] for group in groups for target in group["targets"]}
    assert hosts - {"localhost"} <= set(COMPOSE["services"])
    for host in hosts - {"localhost"}:
        assert "monitoring" in COMPOSE["services"][host]["networks"]
    # Prometheus has no way to the database.
    assert COMPOSE["services"]["prometheus"]["networks"] == ["monitoring"]
    assert "networks" not in COMPOSE["services"]["db"]


def test_the_roles_script_is_mounted_where_its_comment_says() -> None:
    script = (ROOT / "docker" / "monitoring.sh").read_text()
    assert "/docker-entrypoint-initdb.d/110-monitoring.sh" in script
    assert any(v.endswith("110-monitoring.sh:ro") for v in COMPOSE["services"]["db"]["volumes"])
