"""The ring holds the last traces whole, within its bounds, whatever comes in whatever order."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from observability.ring import MAX_SPANS, SPAN_OVERHEAD, TRACE_OVERHEAD, Ended, Held, Ring

_TRACES = st.sampled_from([f"{number:032x}" for number in range(8)])
MOST, BYTES = 4, 20_000


def held(text: str = "x", *, sampled: bool = False) -> Held:
    return Held("triptych", sampled, text.encode())


def ended(trace_id: str, number: int = 0, **changes: object) -> Ended:
    values = {"pipeline": "echo", "operation": "chat", "status": 200, "reason": "", "duration_ms": 1.0, **changes}
    return Ended(trace_id, f"{number:016x}", f"req_{number}", started_ns=number, **values)  # type: ignore[arg-type]


class Bounds(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(MOST, BYTES)
        self.number = 0

    @rule(trace_id=_TRACES, size=st.integers(0, 9000))
    def add(self, trace_id, size):
        self.number += 1
        span = held(f"{self.number}" + "x" * size)
        self.ring.add(trace_id, span)
        cost = TRACE_OVERHEAD + SPAN_OVERHEAD + len(span.encoded)
        assert cost > BYTES or not self.ring.spans(trace_id) or self.ring.spans(trace_id)[-1] == span

    @rule(trace_id=_TRACES)
    def end(self, trace_id):
        self.number += 1
        self.ring.end(ended(trace_id, self.number))
        assert not self.ring.requests() or self.ring.requests()[0].request_id == f"req_{self.number}"

    @rule(trace_id=_TRACES)
    def claim(self, trace_id):
        before = self.ring.spans(trace_id)
        claimed = self.ring.claim(trace_id)
        assert claimed in ([], before)
        assert self.ring.claim(trace_id) == []

    @invariant()
    def within_bounds(self):
        assert self.ring.bytes <= BYTES
        assert len(self.ring) <= 2 * MOST
        spans = [span for number in range(8) for span in self.ring.spans(f"{number:032x}")]
        assert self.ring.bytes == len(self.ring) * TRACE_OVERHEAD + sum(
            len(span.encoded) + SPAN_OVERHEAD for span in spans
        )


TestBounds = Bounds.TestCase
TestBounds.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_what_runs_outlives_what_has_ended():
    ring = Ring(3, 1_000_000)
    ring.add("a" * 32, held("admission"))
    for number in range(20):
        ring.add(f"{number:032x}", held())
        ring.end(ended(f"{number:032x}", number))
    ring.add("a" * 32, held("chat"))
    ring.end(ended("a" * 32, 99))
    assert [span.encoded for span in ring.spans("a" * 32)] == [b"admission", b"chat"]
    assert [request.request_id for request in ring.requests()] == ["req_99", "req_19", "req_18"]


def test_spans_that_come_after_the_end_are_kept():
    ring = Ring(3, 1_000_000)
    ring.end(ended("a" * 32))
    assert ring.add("a" * 32, held("late")) is False
    assert [span.encoded for span in ring.claim("a" * 32)] == [b"late"]
    assert ring.add("a" * 32, held("later")) is True
    assert len(ring.spans("a" * 32)) == 2


def test_a_caller_that_goes_on_under_one_trace_id_is_bounded():
    ring = Ring(3, 10_000_000)
    for number in range(3 * MAX_SPANS):
        ring.add("a" * 32, held(str(number)))
        ring.end(ended("a" * 32, number))
    assert len(ring.spans("a" * 32)) == MAX_SPANS
    assert ring.spans("a" * 32)[-1].encoded == str(3 * MAX_SPANS - 1).encode()
    assert len(ring.requests()) == MAX_SPANS
    assert ring.bytes < MAX_SPANS * (SPAN_OVERHEAD + 10) + TRACE_OVERHEAD


def test_nothing_is_found_of_a_trace_that_is_not_there():
    ring = Ring(3, 1000)
    assert ring.spans("a" * 32) == ring.claim("a" * 32) == ring.requests() == []
