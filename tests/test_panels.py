"""The picture of the dashboard: every panel is in it, and says what Prometheus answered, or that it did not."""

from __future__ import annotations

import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import panels

asked: list[str] = []


class Prometheus(BaseHTTPRequestHandler):
    """Answers every query for tokens with a line that ends at 250, others with nothing."""

    def do_GET(self) -> None:
        wanted = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        (query,) = wanted["query"]
        asked.append(query)
        start, end = float(wanted["start"][0]), float(wanted["end"][0])
        values = [[start, "10"], [start + 5, "NaN"], [end - 5, "200"], [end, "250"]]
        result = [{"metric": {"type": "<output>"}, "values": values}] if "triptych_tokens" in query else []
        body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Prometheus) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_whole_dashboard_is_drawn(prometheus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "board.svg"
    monkeypatch.setattr(sys, "argv", ["panels", "--prometheus", prometheus, "--out", str(out)])
    panels.main()
    board = json.loads(panels.BOARD.read_text(encoding="utf-8"))
    assert len(asked) == sum(len(panel.get("targets", ())) for panel in board["panels"])
    assert not any("$" in query for query in asked)
    texts = [element.text for element in ElementTree.parse(out).iter() if element.tag.endswith("text")]
    for panel in board["panels"]:
        assert panel["title"] in texts
    assert "<output>  250" in texts  # the legend of the graph of tokens
    assert "250" in texts  # the figure of its own
    drawn = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert texts.count("no data") == len(drawn) - 2


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (0.0, "s", "0 ms"),
        (2.5, "s", "2.5 s"),
        (40, "µs", "40 µs"),
        (0.987, "percentunit", "98.7 %"),
        (12_345, "short", "12.3k"),
        (3.25, "reqps", "3.25 req/s"),
    ],
)
def test_values_are_short(value: float, unit: str, text: str) -> None:
    assert panels._value(value, unit) == text


@pytest.mark.parametrize(("top", "nice"), [(0, 1), (0.04, 0.05), (1, 1), (1.1, 1.5), (51, 75), (-1, 1)])
def test_an_axis_ends_at_a_round_number(top: float, nice: float) -> None:
    assert panels._nice(top) == pytest.approx(nice)
