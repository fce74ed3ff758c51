"""The dashboard and the alerts ask for what there is: their shape, their queries, every metric and label in them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.product import Product
from tests.promql import named
from tests.scraped import samples

FOLDER = Path(__file__).parent.parent / "observability"
BOARD: dict[str, Any] = json.loads((FOLDER / "grafana/dashboards/triptych.json").read_text(encoding="utf-8"))
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
# Triton's, read from a real one by the last test here.
TRITON = {
    "nv_inference_exec_count": {"model", "version"},
    "nv_inference_compute_infer_duration_us": {"model", "version"},
    "nv_inference_request_failure": {"model", "version", "reason"},
    "nv_inference_pending_request_count": {"model", "version"},
}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: it is in the package `prometheus`)"
)


def expressions() -> list[str]:
    """Every query, as Grafana would send it."""
    panels = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    asked = [*panels, *(annotation["expr"] for annotation in BOARD["annotations"]["list"])]
    shown = [text.replace("$pipeline", ".*").replace("$__rate_interval", "1m") for text in asked]
    assert not [text for text in shown if "$" in text]
    return shown + [rule["expr"] for rule in RULES]


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_an_expression_names() -> None:
    text = 'sum by (a, le) (rate(x_bucket{b="c}", d=~"e"}[5m])) / 2^20 > 0 and on () up{job="t"} == 1 or vector(0)'
    assert named(text) == ({"x_bucket": {"b", "d"}, "up": {"job"}}, {"a", "le"})


def test_the_dashboard_has_grafanas_shape() -> None:
    schema = json.loads((Path(__file__).parent / "grafana_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(BOARD)
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in BOARD["panels"]:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(letters)) == len(letters)


def test_no_panel_lies_on_another() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        return set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))

    for one, other in itertools.combinations(BOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_every_metric_and_label_exists() -> None:
    """In a gateway's own /metrics, or among Triton's."""
    known: dict[str, set[str]] = defaultdict(set)
    for name, labels in samples():
        known[name] |= set(labels)
    known |= TRITON
    known["up"] = set()
    for expression in expressions():
        metrics, grouped = named(expression)
        assert metrics, expression
        for name, labels in metrics.items():
            assert name in known, f"{name} does not exist: {expression}"
            missing = (labels | grouped) - known[name] - {"job", "instance"}
            assert not missing, f"{name} has no label {missing}: {expression}"


def test_the_variable_asks_for_a_metric_with_the_label() -> None:
    (variable,) = BOARD["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert any(name == metric and label in labels for name, labels in samples())


def test_every_alert_says_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert all(rule["annotations"][name].strip() for name in ("summary", "description")), rule["alert"]
        assert rule["for"]


@needs_promtool
def test_every_query_parses(tmp_path: Path) -> None:
    rules = [{"record": f"test:query:{number}", "expr": text} for number, text in enumerate(expressions())]
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", FOLDER / "prometheus.yaml")


@needs_promtool
def test_each_alert_fires_and_does_not() -> None:
    promtool("test", "rules", FOLDER / "alerts_test.yaml")
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in RULES:
        mine = [case for case in cases if case["alertname"] == rule["alert"]]
        fires = {bool(case.get("exp_alerts")) for case in mine}
        beside = any(
            len(test["input_series"]) > 1 for test in tests for case in test["alert_rule_test"] if case in mine
        )
        assert True in fires, rule["alert"]
        assert False in fires or beside, rule["alert"]


def test_what_is_provisioned_fits_together() -> None:
    sources = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/triptych.yaml").read_text())["datasources"]
    by_uid = {source["uid"]: source for source in sources}
    assert BOARD["panels"][0]["datasource"]["uid"] in by_uid
    (exemplars,) = by_uid["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplars["name"] == "trace_id"
    assert by_uid[exemplars["datasourceUid"]]["type"] == "jaeger"
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":") for service in services.values() for mount in service["volumes"]]
    inside = {target: FOLDER / source for source, target, *_ in mounts if source.startswith(".")}
    assert all(source.exists() for source in inside.values())
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/triptych.yaml").read_text())["providers"]
    assert (inside[provider["options"]["path"]] / "triptych.json").exists()
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (inside[str(home.parent)] / home.name).exists()
    command = services["prometheus"]["command"]
    config = next(word.partition("=")[2] for word in command if word.startswith("--config.file"))
    assert inside[config].exists()
    assert "--enable-feature=exemplar-storage" in command


def test_tritons_metrics_are_what_is_asked_for(product: Product) -> None:
    with urllib.request.urlopen(f"{product.url}/metrics/triton", timeout=10) as response:
        text = response.read().decode()
        assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)\{(.*)\} ", text, re.MULTILINE):
        found[name] = set(re.findall(r'(\w+)="', labels))
    for name, wanted in TRITON.items():
        assert found.get(name) == wanted, name


def test_every_metric_is_explained() -> None:
    """In docs/metrics.md; a name there that begins with _ is short for an engine's."""
    text = (FOLDER.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named_there = {name for cell in first for name in re.findall(r"`(\w+)\*?`", cell)}
    explained = {f"triptych_engine{name}" if name.startswith("_") else name for name in named_there}
    told = {re.sub(r"_(bucket|count|sum)$", "", name) for name, _ in samples()}
    ours = {name for name in told if name.startswith(("triptych_", "gen_ai_"))}
    assert ours - explained == set()
    wrong = {name for name in explained if name.startswith(("triptych_", "gen_ai_"))} - ours
    assert wrong == set()
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"`(Triptych\w+)`", text))
