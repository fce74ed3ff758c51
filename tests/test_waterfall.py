"""The trace in the terminal: right at 80 columns and at any other, safe, and with one sentence that is true."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability import waterfall
from observability.completeness import GATEWAY, check
from observability.explain import explain, ms
from observability.keeping import LOAD_PHASES, LOAD_PHASES_MS, medians
from observability.spans import Event, Link, SpanData
from observability.waterfall import ANSI, ASCII, display_width, draw, fit
from tests.spans import BEGAN, MS, request, span
from tests.test_spans import _SPANS

USUAL = medians([request()] * 9)


def test_the_drawing():
    spans = request(prefill_ms=320)
    spans[2].events.append(Event("first text", BEGAN + 327 * MS))
    spans[6].links += [Link("ab" * 16, "1" * 16)] * 6
    spans[9].attributes = {"triptych.gap_ms.bounds": [1, 20, 50], "triptych.gap_ms.counts": [0, 8, 0, 2]}
    lines = draw(spans, USUAL, 9)
    del lines[2]  # the time is this machine's
    assert "\n".join(lines) == DRAWING


DRAWING = """\
prefill took 320 ms, 4.0 x its usual 80.0 ms (median of 9).

request req_1
                          0                                               428 ms
POST /v1          428 ms  ██████████████████████████████████████████████████████
├ admission      0.90 ms  ▏
├ chat m          426 ms  ██████████████████████████████████████████████████████
│ │ • first text at 327 ms
│ ├ preprocess    3.0 ms  ▏
│ │ ├ render      1.0 ms  ▏
│ │ └ tokenize    2.0 ms  ▏
│ ├ generate      421 ms  █████████████████████████████████████████████████████
│ │ │ • in a batch with abababab, abababab, abababab, abababab and 2 more
│ │ ├ queue       1.0 ms  ▏
│ │ ├ prefill     320 ms  ████████████████████████████████████████
│ │ └ decode      100 ms                                           █████████████
│ │     • between tokens ≤20 ms ×8, >50 ms ×2
│ └ postprocess   100 ms                                           █████████████
└ sse.write       422 ms  █████████████████████████████████████████████████████"""


def cold(load_ms: float = 4000, **options: Any) -> list[SpanData]:
    """A request that had to wait for its pipeline to be loaded."""
    spans = request()
    for later in (spans[0], *spans[2:]):
        later.start_ns += int((later is not spans[0]) * load_ms * MS)
        later.end_ns += int(load_ms * MS)
    spans[1].end_ns += int(load_ms * MS)
    phases = {LOAD_PHASES: ["spawn", "import", "weights", "warm-up"], LOAD_PHASES_MS: [400.0, 900.0, 2500.0, 200.0]}
    load = span("model.load", 0.2, 0.7 + load_ms, "admission", **{"attributes": phases, **options})
    return [*spans[:2], load, *spans[2:]]


def test_a_cold_start_is_told_with_its_phases():
    spans = cold()
    assert check(spans, expect=GATEWAY) == []
    assert explain(spans, USUAL, 9) == (
        "It came to a cold pipeline: 4.00 s of 4.19 s was the wait for its model to be loaded, 2.50 s of that weights."
    )
    lines = draw(spans, USUAL, 9)
    (number,) = [number for number, line in enumerate(lines) if line.startswith("│ └ model.load ")]
    assert " 4.00 s " in lines[number]
    assert lines[number + 1] == "│     • spawn 400 ms, import 900 ms, weights 2.50 s, warm-up 200 ms"


@pytest.mark.parametrize(
    ("spans", "sentence"),
    [
        (cold(attributes={}), "It came to a cold pipeline: 4.00 s of 4.19 s was the wait for its model to be loaded."),
        (cold(10), "decode took most of it"),  # another had it loaded, but for a moment
        (cold(error="no room", attributes={"error.type": "overloaded"}), "model.load failed after 4.19 s: overloaded"),
    ],
)
def test_what_is_said_of_other_cold_starts(spans, sentence):
    assert explain(spans, USUAL, 9).startswith(sentence)


@pytest.mark.parametrize(
    ("spans", "usual", "requests", "sentence"),
    [
        (request(prefill_ms=320), USUAL, 9, "prefill took 320 ms, 4.0 x its usual 80.0 ms (median of 9)."),
        (request(), USUAL, 9, "decode took most of it, 100 ms of 188 ms; no stage was slower than usual."),
        (request(prefill_ms=320), USUAL, 4, "prefill took most of it, 320 ms of 428 ms; too few requests yet to say"),
        (request(decode_ms=1000, tokens=101), USUAL, 9, "decode took most of it, 1.00 s of 1.09 s; no stage was"),
        (request(decode_ms=1000), USUAL, 9, "decode took 1.00 s: 100 ms a token, 10.0 x its usual 10.0 ms (median"),
        (request(prefill_ms=9000), {"prefill": 0.01}, 9, "prefill took 9.00 s, 900,000 x its usual 0.01 ms"),
        (request(prefill_ms=100), {"decode": 100.0}, 9, "prefill took 100 ms, and usually nothing of 0.00 ms"),
        ([], {}, 0, "The trace has no spans."),
        ([span("a", 0, 5)], {}, 0, "It took 5.0 ms, and no stage has told of it."),
    ],
)
def test_one_sentence_names_the_slow_stage(spans, usual, requests, sentence):
    assert explain(spans, usual, requests).startswith(sentence)


def test_the_sentence_of_a_failure_names_its_stage():
    spans = request()
    spans[0].attributes["error.type"] = spans[2].attributes["error.type"] = "timeout"
    spans[0].error = "time is up"
    spans[6].attributes["error.type"], spans[6].error = "timeout", ""
    assert explain(spans, USUAL, 9) == "generate failed after 188 ms: timeout (time is up)."
    spans[0].error = "Time is up."
    assert explain(spans, USUAL, 9) == "generate failed after 188 ms: timeout (Time is up)."


def test_pictures_are_told_where_they_were_read_decoded_and_made_features():
    told = [
        ({"triptych.image.count": 2, "triptych.image.bytes": 9431}, "9.4 kB, pictures: 2"),
        (
            {
                "triptych.image.formats": ["PNG"] + ["JPEG"] * 5,
                "triptych.image.widths": [320] * 6,
                "triptych.image.heights": [240] * 6,
            },
            "PNG 320 x 240, JPEG 320 x 240, JPEG 320 x 240, JPEG 320 x 240 and 2 more",
        ),
        ({"triptych.features.bytes": 1_354_752}, "1.4 MB of what the model sees"),
    ]
    for attributes, note in told:
        one = span("a", 0, 5)
        one.attributes = attributes
        assert f"• {note}" in "\n".join(draw([one], {}, 0, width=120))


def test_the_sentence_of_a_client_that_left_says_when():
    spans = request()[:-3]
    spans[0].attributes["error.type"] = "disconnected"
    assert explain(spans, USUAL, 9) == "The client left after 188 ms, in prefill."


def test_the_sentence_of_a_slow_client():
    spans = request(prefill_ms=320)
    spans[-1].attributes["triptych.sse.blocked_ms"] = 200.0
    assert explain(spans, USUAL, 9) == "The client was slow: writing waited 200 ms of 428 ms for it."


@given(st.lists(_SPANS, max_size=12), st.integers(1, 200), st.sampled_from([waterfall.UNICODE, ASCII]))
def test_no_line_is_wider_than_the_terminal_whatever_the_spans(spans, width, signs):
    for line in draw(spans, USUAL, 9, width=width, signs=signs):
        assert display_width(line) <= max(width, waterfall.NARROWEST)
        assert line.isprintable()


@given(st.lists(_SPANS, min_size=1, max_size=12))
def test_every_span_has_a_line_even_where_the_tree_is_broken(spans):
    for number, one in enumerate(spans):
        one.name = f"name{number}"
    drawn = "\n".join(draw(spans, {}, 0, width=400))
    for one in spans:
        assert re.search(rf"\b{one.name}\b", drawn)


def test_names_of_any_script_keep_the_columns():
    spans = [
        span("POST /v1", 0, 10),
        span("chat 模型模型模型", 0, 10, "POST /v1", id="a"),
        span("chat é́ü", 0, 10, "POST /v1"),
    ]
    lines = draw(spans, {}, 0)[-3:]
    assert len({display_width(line) for line in lines}) == 1
    assert fit("模型", 3) == "模…"
    assert fit("模型", 2) == "… "


def test_nothing_that_a_terminal_obeys_is_shown():
    spans = [span("a\x1b[31m\u202eb\r\n", 0, 1, error="\x1b]0;title\x07", attributes={"error.type": "\x9b"})]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", "\n".join(draw(spans, {}, 0)))


def test_colours_change_nothing_but_colours():
    spans = request(prefill_ms=320)
    spans[6].error = "broken"
    plain, coloured = draw(spans, USUAL, 9), draw(spans, USUAL, 9, colours=ANSI)
    assert [re.sub(r"\x1b\[\d+m", "", line).rstrip() for line in coloured] == plain
    marked = next(line for line in coloured if "broken" in line and "✗" in line)
    assert ANSI.error in marked


def test_ascii_is_enough():
    spans = request()
    spans[6].error = "broken"
    assert all(line.isascii() for line in draw(spans, USUAL, 9, signs=ASCII))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.004, "0.00 ms"),
        (9.94, "9.9 ms"),
        (99.9, "99.9 ms"),
        (100.4, "100 ms"),
        (1500, "1.50 s"),
        (3.6e6, "3600 s"),
        (7.2e7, "20 h"),
        (-5, "< 0 ms"),
    ],
)
def test_durations_fit_their_column(value, text):
    assert ms(value) == text
