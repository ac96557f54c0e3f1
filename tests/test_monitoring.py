"""docs/monitoring: the alert rules and the dashboard ask for what is exported, and say where to read on."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from saga_store import MemorySagaStorage, StorageUnavailableError
from saga_store.inspection import SagaCondition, SagaFigures
from saga_store.telemetry import Call
from saga_store.telemetry.opentelemetry import OpenTelemetry
from saga_store.telemetry.prometheus import SagaCollector, exposition, samples

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "docs" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = MONITORING / "dashboard.json"
ALERT_TESTS = ROOT / "tests" / "monitoring" / "alerts_test.yml"
# What Prometheus adds by itself to whatever it scrapes.
OF_A_TARGET = {"job", "instance", "pod"}
# Chapters of the runbook that are no symptoms.
OF_ALL_SYMPTOMS = {"when-sagas-are-stuck", "first", "whatever-it-was"}

Rule = dict[str, Any]


def rules() -> list[Rule]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> list[str]:
    """Return the dashboard's, with what Grafana fills in."""
    targets = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "5m").replace("$job", "shop|other") for query in targets]


def exported() -> dict[str, set[str]]:
    """Return the labels of each metric that Prometheus gets to see, from the collector and from OpenTelemetry."""
    condition = {(name, condition): 1 for name in ("a", "b") for condition in SagaCondition}
    sizes = {("saga_logs", "heap"): 1}
    figures = SagaFigures(condition, timedelta(), 1, 1, 1, 1, sizes, {"saga_logs": 1}, retention_lag=timedelta())
    figures = replace(figures, last_archived_at=datetime(2026, 11, 26, tzinfo=UTC))
    figures = replace(figures, shards={0: figures})
    found = {one["name"]: set(one["labels"]) for one in samples(exposition(figures))}
    for name, unit, labels in instruments():
        prometheus_name = name.replace(".", "_") + {"s": "_seconds"}.get(unit, "")
        if isinstance(labels, Histogram):
            for part, more in (("bucket", {"le"}), ("count", set[str]()), ("sum", set[str]())):
                found[f"{prometheus_name}_{part}"] = labels.names | more
        else:
            found[f"{prometheus_name}_total"] = labels
    return found


class Histogram:
    def __init__(self, names: set[str]) -> None:
        self.names = names


def instruments() -> Iterator[tuple[str, str, "Histogram | set[str]"]]:
    """Yield each instrument's name and unit, and its attributes as Prometheus spells them."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    telemetry = OpenTelemetry(meter=provider.get_meter("test"))
    telemetry.begin(Call("get_saga", "saga_executions", namespace="shop", host="db", port=5432))(None)
    telemetry.begin(Call("get_saga", "saga_executions"))(StorageUnavailableError("down", "57P03"))
    telemetry.flushed(3, [0.1])
    telemetry.retried(StorageUnavailableError("a deadlock", "40P01"))
    telemetry.resolved("unknown")
    telemetry.waited_for_lock(0.1)
    data = reader.get_metrics_data()
    assert data is not None
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                points: list[Any] = list(metric.data.data_points)
                labels = {name.replace(".", "_") for point in points for name in point.attributes or ()}
                yield (
                    metric.name,
                    metric.unit or "",
                    Histogram(labels) if hasattr(points[0], "bucket_counts") else labels,
                )
    provider.shutdown()


def selectors(query: str) -> list[promql.VectorSelector]:
    """Parse a query, and return what it asks for."""
    found: list[promql.VectorSelector] = []

    def keep(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)

    promql.walk(promql.parse(query), keep)
    return found


def grouped_by(query: str) -> set[str]:
    return {label.strip() for group in re.findall(r"\b(?:by|without) \(([^)]*)\)", query) for label in group.split(",")}


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in rules()), *queries()], ids=lambda query: query[-70:])
def test_queries_ask_for_what_is_exported(query: str) -> None:
    """Each metric is one that we export, each label one that it has, each condition one that there is."""
    known = exported()
    asked = selectors(query)
    assert asked
    for selector in asked:
        assert selector.name in known
        for matcher in selector.matchers.matchers:
            assert matcher.name in known[selector.name] | OF_A_TARGET
            if matcher.name == "condition":
                assert set(matcher.value.split("|")) <= set(SagaCondition)
    assert grouped_by(query) <= set.union(*(known[selector.name or ""] for selector in asked)) | OF_A_TARGET


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in rules()), *queries()], ids=lambda query: query[-70:])
def test_what_all_instances_tell_is_not_added_up(query: str) -> None:
    """Every instance of an application exports the figures of the one database, so they go through max first."""
    of_figures = {family.name for family in SagaCollector(MemorySagaStorage()).describe()}
    for selector in selectors(query):
        if (selector.name or "").removesuffix("_total") in of_figures:
            before = query[: query.index(selector.name or "")]
            assert re.search(r"(max without \(instance, pod\) \((rate\(|delta\()?|absent\()$", before)


def test_every_figure_is_on_the_dashboard() -> None:
    """Nothing is exported for nobody to see."""
    shown = {selector.name for query in queries() for selector in selectors(query)}
    left_out = {re.sub("_(bucket|count|sum)$", "", name) for name in exported()} - {
        re.sub("_(bucket|count|sum)$", "", name or "") for name in shown
    }
    assert not left_out


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: Rule) -> None:
    """It has a summary, a severity, a time for which it has to be so, and a heading in our docs to read on."""
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    promql.parse_duration(rule["for"])
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    assert anchor in headings(ROOT / page)
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= set.union(
            *(exported()[selector.name or ""] for selector in selectors(rule["expr"]))
        )


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_symptom_has_an_alert() -> None:
    """Whatever the runbook has a chapter on is noticed by somebody."""
    pages = [rule["annotations"]["runbook_url"].split("#") for rule in rules()]
    symptoms = headings(ROOT / "docs" / "operations.md") - OF_ALL_SYMPTOMS
    assert {anchor for page, anchor in pages if page == "docs/operations.md"} == symptoms


def test_every_alert_is_tried() -> None:
    """There is a situation in which it fires and one in which it doesn't; promtool runs them where it is to be had."""
    situations = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    tried = [(test["alertname"], bool(test.get("exp_alerts"))) for one in situations for test in one["alert_rule_test"]]
    assert set(tried) == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}
    promtool = shutil.which("promtool")
    if promtool:
        for command in (["check", "rules", str(ALERTS)], ["test", "rules", str(ALERT_TESTS)]):
            done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


class TestDashboard:
    def test_it_can_be_imported_anywhere(self) -> None:
        """It names no data source of anybody's: which one, and which jobs, are variables."""
        dashboard = json.loads(DASHBOARD.read_text())
        names = [variable["name"] for variable in dashboard["templating"]["list"]]
        assert names == ["datasource", "job"]
        sources = {found["uid"] for found in _values(dashboard, "datasource") if isinstance(found, dict)}
        assert sources == {"${datasource}"}
        assert "id" not in dashboard

    def test_its_panels_fit(self) -> None:
        """Each has an id and a place of its own, a title, a description, and queries by letters of their own."""
        places: set[tuple[int, int]] = set()
        assert len({panel["id"] for panel in panels()}) == len(panels())
        for panel in panels():
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & places
            assert max(x for x, _ in cells) < 24
            places |= cells
            assert panel["title"]
            if panel["type"] != "row":
                assert panel["description"].endswith((".", "?"))
                letters = [target["refId"] for target in panel["targets"]]
                assert len(set(letters)) == len(letters) > 0


def _values(node: object, key: str) -> Iterator[object]:
    """Yield what stands under this key, anywhere."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for inner in node.values():
            yield from _values(inner, key)
    elif isinstance(node, list):
        for inner in node:
            yield from _values(inner, key)
