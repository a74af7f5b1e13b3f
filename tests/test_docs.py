"""The documents name every setting, route, metric, problem and code there is."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from app import __version__, cli, errors
from app.api.ingest import IngestQuery
from app.db.needs import NAMES as NEEDED
from app.db.sessions import LATER, SETTINGS
from app.formats import FORMATS
from app.main import create_app
from app.metrics import REGISTRY
from app.quote.fields import ALIASES, NAMES
from app.quote.terms import Receipt
from app.repository.bars import BarPrice, Reason
from app.settings import Settings
from tests.chaos.__main__ import PARTS
from tests.hostile.__main__ import ATTACKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()


def test_every_setting_is_in_the_readme() -> None:
    rows = json.loads(CliRunner().invoke(cli.app, ["settings", "--json"]).stdout)
    assert len(rows) == len(Settings.model_fields)
    for row in rows:
        default = f"`{row['default']}`" if row["default"] else ""
        assert f"| `{row['variable']}` | {default} | {row['meaning']} |" in README


def test_every_route_is_in_the_readme() -> None:
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]
    for path, operations in paths.items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in README or f"`{path}`" in README, path


def test_every_metric_is_documented_and_nothing_else() -> None:
    declared = {
        name
        for collector in REGISTRY._collector_to_names
        for name in [getattr(collector, "_name", "")]
        if name.startswith(("quotes_", "timescaledb_"))
    }
    listed = {
        name.removesuffix("_total")
        for name in re.findall(r"`((?:quotes|timescaledb)_\w+)`", (ROOT / "docs/metrics.md").read_text())
    }
    assert listed == declared


def test_every_problem_and_every_code_is_documented() -> None:
    codes = {kind.code for kind in _tree(errors.QuotesError)} - {
        "internal-error",
        "startup-error",
        "backup-error",
        "client-error",
    }
    # In these modules every hyphenated word in quotes is the code of a refused row.
    for module in ("clock.py", "quote/rules.py", "quote/rows.py", "formats/csv.py", "repository/ingest.py"):
        codes |= set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', (ROOT / "app" / module).read_text()))
    assert len(codes) > 25
    for code in codes:
        assert f"`{code}`" in API, code


def test_every_503_and_every_part_of_chaos_and_of_hostile_is_in_the_promises() -> None:
    promises = (ROOT / "docs/reliability.md").read_text()
    codes = {kind.code for kind in _tree(errors.QuotesError) if kind.status == 503}
    assert codes <= set(re.findall(r"`([a-z-]+)`", promises))
    named = {name for row in promises.splitlines() for name in re.findall(r"`([a-z]+)`", row) if row.startswith("|")}
    assert named >= {*PARTS, *ATTACKS}
    for file in re.findall(r"`(tests/\w+\.py)`", promises):
        assert (ROOT / file).exists(), file


def test_every_setting_of_the_server_that_matters_is_in_the_table() -> None:
    table = (ROOT / "docs/deployment.md").read_text().partition("### Server settings")[2].partition("### Poolers")[0]
    named = {name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`([\w.]+)`", row)}
    later = {name for settings in LATER.values() for name in settings}
    assert named >= {*NEEDED, *SETTINGS, *later, "synchronous_commit", "search_path"}


def _documented(opening: str) -> list[str]:
    """The names in the first column of a table of the API, given its first two lines."""
    table = API.partition(opening)[2].partition("\n\n")[0]
    return [name for row in table.splitlines() for name in re.findall(r"`(\w[\w-]*)`", row.split("|")[1])]


def test_every_field_is_documented_and_nothing_else() -> None:
    assert _documented("| field | rule |\n|---|---|\n") == list(NAMES)


def test_every_option_and_every_figure_of_ingest_is_documented() -> None:
    for name, schema in IngestQuery.model_json_schema()["properties"].items():
        assert f"`{name}=" in API, name
        for kind in schema.get("anyOf", [schema]):
            for choice in kind.get("enum", ()):
                assert re.search(rf"[`=|]{choice}[`|]", API), (name, choice)
    assert _documented("| member | counts |\n|---|---|\n") == list(Receipt.__struct_fields__)


def test_every_price_of_a_bar_and_every_reason_for_none_is_documented() -> None:
    assert set(_documented("| `price` | made of |\n|---|---|\n")) == set(get_args(BarPrice))
    assert set(_documented("| reason | |\n|---|---|\n")) == set(get_args(Reason))


def test_every_other_name_of_a_field_is_documented_and_nothing_else() -> None:
    table = API.partition("| name | field |\n|---|---|\n")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", table, re.MULTILINE)) == ALIASES


def test_every_format_is_documented_with_an_example() -> None:
    for fmt in FORMATS.values():
        assert f"| {', '.join(f'`{media}`' for media in fmt.media_types)} |" in API
        assert f"-H 'content-type: {fmt.media_types[0]}'" in API


def _tree(kind: type[errors.QuotesError]) -> set[type[errors.QuotesError]]:
    ours = {sub for sub in kind.__subclasses__() if sub.__module__ == "app.errors"}
    return {kind}.union(*(_tree(sub) for sub in ours))


def test_every_error_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for kind in _tree(errors.QuotesError):
        assert re.search(rf"\b{kind.__name__}\b", errors.__doc__), kind


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=str)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_changelog_has_the_version() -> None:
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_alembic_is_not_shadowed() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()
