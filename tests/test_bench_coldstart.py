"""The cold start bench: its arithmetic, its readers, and a round of it against a running product."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import coldstart
from bench.coldstart import BenchError, Gateway
from bench.echoes import Served
from tests.product import Product

PHASES = dict.fromkeys(coldstart.PHASES, 0.5) | {"first_token": 0.25}


def test_medians_and_ratios_by_round() -> None:
    colds = [{"total": total, **PHASES} for total in (2.0, 4.0, 3.0)]
    parkeds = [{"total": 0.2, "wake": wake} for wake in (0.1, 0.1, 0.6)]
    found = coldstart.result(colds, parkeds, {"ours": 9.0, "raw": 10.0, "safetensors": 3.0})
    assert found["cold_first_token_s"] == 3.0
    assert found["parked_first_token_s"] == 0.2
    assert found["parked_vs_cold"] == pytest.approx(0.2 / 3)
    assert found["wake_s"] == 0.1
    assert found["load_vs_raw_disk"] == 0.9
    assert found["load_vs_safetensors"] == 3.0
    assert found["phases_s"] == PHASES


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def serving(*asked: Any, **how: Any) -> Any:
        yield Served("http://127.0.0.1:9", "127.0.0.1:9", 0, Path())

    found = [{"total": 2.0, **PHASES}], [{"total": 0.2, "wake": 0.1}]
    monkeypatch.setattr(coldstart, "measure", lambda *asked: found)
    monkeypatch.setattr(coldstart, "serving", serving)
    monkeypatch.setattr(coldstart, "reading", lambda *asked: {"ours": 9.0, "raw": 10.0, "safetensors": 3.0})
    assert coldstart.main(["--rounds", "1"]) == 0
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "warm_up" in table
    assert json.loads(line)["phases_s"].keys() == PHASES.keys()


def test_without_a_gateway_it_says_so() -> None:
    with pytest.raises(BenchError, match=r"no gateway answers at 127\.0\.0\.1:9"):
        Gateway("http://127.0.0.1:9", "echo").shown()


def test_what_was_never_loaded_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coldstart, "kept_at", lambda pipeline: tmp_path / "nothing")
    with pytest.raises(BenchError, match="load echo once"):
        coldstart.reading("echo", 1)


def test_a_round_against_the_product(own_product: Product) -> None:
    """Unloaded, loaded, parked, woken: an echo has the same life, and nothing to load."""
    gateway = Gateway(own_product.url, "echo-small")
    cold, parked = coldstart.cold(gateway), coldstart.parked(gateway)
    assert cold.keys() == {"total", *PHASES}
    assert cold["total"] > cold["spawn"] > 0
    assert parked["total"] > 0
    assert parked["wake"] >= 0
    with pytest.raises(BenchError, match="There is no pipeline"):
        Gateway(own_product.url, "nobody").shown()
