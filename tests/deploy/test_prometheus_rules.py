"""The files for Prometheus and Grafana: valid, tested by promtool, and about series that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from dashboard_queries import dashboard_queries
from prometheus_client import CollectorRegistry, Histogram

from hydraserve.metrics import ADAPTER, Metrics

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "hydraserve.rules.yml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here; Debian has it in: apt-get install prometheus"
)


def promtool(*arguments: str | Path, cwd: Path = RULES.parent) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grafana_dashboard", DEPLOY / "grafana" / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "hydraserve.json").read_text())
    return found


def rule_expressions() -> list[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def series() -> dict[str, set[str]]:
    """Every series that /metrics can show -> its labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(Metrics(CollectorRegistry())).values():
        labels = {*metric._labelnames}
        for family in metric.describe():
            if isinstance(metric, Histogram):
                found |= {f"{family.name}_{part}": labels | {"le"} for part in ("bucket", "sum", "count")}
            else:
                found[family.name + ("_total" if family.type == "counter" else "")] = labels
    return found


@needs_promtool
def test_scrape_configuration_is_valid() -> None:
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_rules_pass_their_unit_tests() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES.name)
    promtool("test", "rules", "hydraserve.rules.test.yml")


def test_every_alert_has_a_unit_test_and_is_explained() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((RULES.parent / "hydraserve.rules.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if "exp_alerts" in case}
    assert alerts == fired
    manual = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    assert {alert for alert in alerts if f"`{alert}`" not in manual} == set()


@needs_promtool
def test_dashboard_queries_are_promql(dashboard: dict[str, Any], tmp_path: Path) -> None:
    rules = [{"record": f"query:{i}", "expr": expr} for i, expr in enumerate(dashboard_queries(dashboard))]
    assert len(rules) > 30
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", "queries.yml", cwd=tmp_path)


def test_queries_name_series_and_labels_that_exist(dashboard: dict[str, Any]) -> None:
    known = series()
    added = {"job", "instance"}  # by Prometheus
    for expr in (*dashboard_queries(dashboard), *rule_expressions()):
        names = {name for name in re.findall(r"[a-zA-Z_:][\w:]*", expr) if name.startswith("hydraserve_")}
        assert names <= set(known), f"{names - set(known)} in {expr}"
        for name, selector in re.findall(r"(hydraserve_\w+)\{([^}]*)\}", expr):
            labels = set(re.findall(r"(\w+)\s*=", selector))
            assert labels <= known[name] | added, expr
        for labels, name in re.findall(r"by \(([^)]*)\) \((?:rate\()?(hydraserve_\w+)", expr):
            assert {label.strip() for label in labels.split(",")} <= known[name] | added, expr


def test_the_dashboard_shows_every_series(dashboard: dict[str, Any]) -> None:
    text = " ".join(dashboard_queries(dashboard))
    shown = {name for name in series() if name in text}
    hidden = {name for name in series() if not name.endswith(("_sum", "_count"))} - shown
    assert hidden == set()


def test_the_dashboard_is_what_its_generator_writes(dashboard: dict[str, Any]) -> None:
    generator = load_generator()
    assert (DEPLOY / "grafana" / "hydraserve.json").read_text() == generator.text(), "run deploy/grafana/dashboard.py"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_series_is_documented() -> None:
    manual = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    for metric in vars(Metrics(CollectorRegistry())).values():
        name = metric.describe()[0].name + ("_total" if metric._type == "counter" else "")
        assert f"`{name}`" in manual, name
        for label in set(metric._labelnames) - set(ADAPTER):
            assert f"`{label}`" in manual, f"{label} of {name}"
