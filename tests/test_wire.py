"""Every message of the wire arrives as it was sent, and the usual ones are short."""

from __future__ import annotations

import math
import time

import orjson

from pipelines import wire
from pipelines.chat import Event, Text, Window
from pipelines.engine import Logprob
from pipelines.errors import StageError
from pipelines.generate import Poll, Row
from pipelines.logprobs import Entry

LOGPROBS = [Logprob(5, -0.25, [(5, -0.25), (9, -3.5)]), Logprob(6, -1.5, [])]
ENTRIES = [[Entry("a", [97], -0.25, [("a", [97], -0.25), ("<end>", None, -9.5)])], []]


def plain(entries: object) -> object:
    """JSON knows no tuples: what it makes of them."""
    return orjson.loads(orjson.dumps(entries, default=tuple))


def test_a_poll() -> None:
    rows = [
        Row("a", [1, 2]),
        Row("b", []),
        Row("c", [3], "length", "", {"queue": 1.5}, 7, LOGPROBS[:1]),
        Row("d", [], "error", "out of memory"),
        Row("e", [5, 6], cached_tokens=4, logprobs=LOGPROBS),
    ]
    ids, packed = wire.pack_poll(Poll(rows, {"running": 3}))
    assert ids == [1, 2, 3, 5, 6]
    assert orjson.loads(packed)["rows"][:2] == [["a", 2], ["b", 0]]
    found = wire.unpack_poll(ids, packed)
    assert found.counters == {"running": 3}
    assert [row._replace(logprobs=list(row.logprobs)) for row in found.rows] == [
        row._replace(stages=dict(row.stages), logprobs=list(row.logprobs)) for row in rows
    ]


def test_what_json_has_no_number_for_is_very_unlikely() -> None:
    """OpenAI, logprob: "the value -9999.0 is used to signify that the token is very unlikely"."""
    top = [(1, -math.inf), (2, -12345.0), (3, math.nan)]
    poll = Poll([Row("a", [1], logprobs=[Logprob(1, -math.inf, top)])], {})
    (row,) = wire.unpack_poll(*wire.pack_poll(poll)).rows
    assert row.logprobs == [Logprob(1, -9999.0, [(1, -9999.0), (2, -9999.0), (3, -9999.0)])]


def test_windows() -> None:
    windows = [
        Window([1, 2], 1, 0, [], False),
        Window([], 0, 3, ["x"], True),
        Window([5, 6], 2, 1 << 30, [], False, LOGPROBS),
    ]
    ids, packed = wire.pack_windows(windows)
    assert orjson.loads(packed)[0] == [2, 1, 0, [], False]
    found = wire.unpack_windows(ids, packed)
    assert [window._replace(logprobs=list(window.logprobs)) for window in found] == [
        window._replace(logprobs=list(window.logprobs)) for window in windows
    ]


def test_texts() -> None:
    texts = [Text(["a"], 1, 0), Text([], 0, 3, stopped=True), Text(["a", ""], 2, 0, False, ENTRIES, 2)]
    packed = wire.pack_texts(texts)
    assert orjson.loads(packed)[0] == [["a"], 1, 0]
    assert plain(wire.unpack_texts(packed)) == plain(
        [texts[0], texts[1]._replace(logprobs=[]), texts[2]._replace(logprobs=ENTRIES)]
    )


def test_events() -> None:
    error = StageError("no", code="timeout", stage="generate")
    events = [
        Event("a", ["x"]),
        Event("b", [], prompt_tokens=3),
        Event("c", ["y", ""], "stop", 3, 4, {"decode": 1.0}, None, ENTRIES, 2),
        Event("d", [], error=error),
        Event("e", [], prompt_tokens=3, pictures=[(640, 480), (1, 2)]),
    ]
    packed = wire.pack_events(events, {"running": 1})
    assert orjson.loads(packed)["events"][0] == ["a", ["x"]]
    found, counters, made_ns = wire.unpack_events(packed)
    assert counters == {"running": 1}
    assert 0 <= time.time_ns() - made_ns < 60e9
    assert [event[:6] for event in found] == [(*event[:5], dict(event.stages)) for event in events]
    assert plain([event.logprobs for event in found]) == plain([event.logprobs for event in events])
    assert [event.cached_tokens for event in found] == [0, 0, 2, 0, 0]
    assert [list(event.pictures) for event in found] == [list(event.pictures) for event in events]
    lengths = [len(event) for event in orjson.loads(packed)["events"]]
    assert lengths == [2, 9, 9, 9, 10]  # what says nothing takes no place
    assert found[3].error is not None
    assert (found[3].error.code, found[3].error.stage) == ("timeout", "generate")


def test_entries_of_a_direct_stream() -> None:
    assert orjson.loads(wire.pack_entries(ENTRIES)) == [["a", [97], -0.25, [["a", [97], -0.25], ["<end>", None, -9.5]]]]
