"""The simulation counts right, and the rule that the lifecycle evicts by keeps what it promises."""

import json
import sys

import pytest

from bench import eviction
from bench.eviction import RULES, Model, Trace, bound, draw, reload_seconds

DAY = eviction.DAY_S


def trace(requests, memory):
    """Models 0, 1, … of 1, 2, … bytes, whose loads take 10, 20, … seconds; requests at (day, model)."""
    models = [Model(size, 10.0 * size, 300.0, None) for size in (1, 2, 3)]
    return Trace(models, [(day * DAY, model) for day, model in requests], memory)


def test_only_what_is_not_in_memory_is_loaded_and_only_after_the_first_day_counts():
    seen = trace([(0, 0), (1, 0), (2, 1), (3, 0), (4, 1)], 3)
    for rule in RULES.values():
        assert reload_seconds(seen, rule(seen)) == 20.0


def test_lru_and_the_future():
    seen = trace([(0, 0), (0.1, 1), (1, 2), (2, 1), (3, 2)], 5)
    assert reload_seconds(seen, RULES["lru"](seen)) == 30.0
    seen = trace([(0, 0), (0.1, 1), (0.2, 0), (1, 2), (2, 0), (3, 2), (4, 1)], 4)
    assert reload_seconds(seen, RULES["lru"](seen)) == 30.0 + 20.0


@pytest.mark.parametrize("skew", [0.6, 1.2])
def test_fewer_reload_seconds_than_lru_and_keep_alive(skew):
    drawn = draw(11, skew, 0.35)
    assert len(drawn.requests) > 40_000
    seconds = {name: reload_seconds(drawn, rule(drawn)) for name, rule in RULES.items()}
    assert seconds["ours"] <= 0.8 * seconds["lru"]
    assert seconds["ours"] <= 0.8 * seconds["keep-alive"]
    assert bound(drawn) < seconds["belady (cost)"] < seconds["ours"]


def test_the_last_line_is_json(monkeypatch, capsys):
    monkeypatch.setattr(eviction, "DAYS", 2)
    monkeypatch.setattr(sys, "argv", ["eviction", "--rounds", "1"])
    eviction.main()
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "skew 0.6, memory 25%" in table
    assert {"reload_seconds_vs_lru", "reload_seconds_vs_keep_alive", "vs_belady"} <= json.loads(line).keys()
