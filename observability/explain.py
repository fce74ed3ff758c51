"""One sentence on a trace: what went wrong, or which stage was slow against what is usual. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from observability.keeping import LOAD, LOAD_PHASES, LOAD_PHASES_MS, PER_TOKEN, STAGES, stage_times
from observability.spans import SpanData

_ENOUGH = 5  # requests, for a median to be called usual
_SLOW = 1.5  # times the usual
_SHARE = 0.1  # of the whole: less is not what made a request slow
_WORTH_MS = 1.0


def explain(spans: Sequence[SpanData], usual: Mapping[str, float], requests: int) -> str:
    """`usual` is the median by stage of so many recent requests of that pipeline."""
    if not spans:
        return "The trace has no spans."
    total = (max(span.end_ns for span in spans) - min(span.start_ns for span in spans)) / 1e6
    if failure := _failure(spans, total):
        return failure
    if cold := _cold_start(spans, total):
        return cold
    blocked = max((float(span.attributes.get("triptych.sse.blocked_ms", 0)) for span in spans), default=0.0)
    if blocked > max(_WORTH_MS, total / 3):
        return f"The client was slow: writing waited {ms(blocked)} of {ms(total)} for it."
    times = stage_times(spans)
    stages = {stage: times[stage] for stage in STAGES if stage in times}
    if not stages:
        return f"It took {ms(total)}, and no stage has told of it."
    if requests >= _ENOUGH and (slow := slow_stage(spans, usual)):
        if slow == "decode" and usual.get(PER_TOKEN):
            each, common = times.get(PER_TOKEN, 0.0), usual[PER_TOKEN]
            return (
                f"decode took {ms(stages[slow])}: {ms(each)} a token, {_ratio(each, common)} its usual {ms(common)} "
                f"(median of {requests})."
            )
        ratio = f"{_ratio(stages[slow], usual[slow])} its usual" if usual.get(slow) else "and usually nothing of"
        return f"{slow} took {ms(stages[slow])}, {ratio} {ms(usual.get(slow, 0.0))} (median of {requests})."
    most = max(stages, key=lambda stage: stages[stage])
    compared = "no stage was slower than usual" if requests >= _ENOUGH else "too few requests yet to say what is usual"
    return f"{most} took most of it, {ms(stages[most])} of {ms(total)}; {compared}."


def slow_stage(spans: Sequence[SpanData], usual: Mapping[str, float]) -> str:
    """The stage that cost most beyond its usual, or "" if none was slow. Decode is judged by the token."""
    times = stage_times(spans)
    total = sum(times.get(stage, 0.0) for stage in STAGES)
    worst, most = "", max(_WORTH_MS, _SHARE * total)
    for stage in STAGES:
        if stage not in times:
            continue
        expected = usual.get(stage, 0.0)
        if stage == "decode" and usual.get(PER_TOKEN) and times.get(PER_TOKEN):
            expected = times[stage] * usual[PER_TOKEN] / times[PER_TOKEN]
        beyond = times[stage] - expected
        if times[stage] > _SLOW * expected and beyond > most:
            worst, most = stage, beyond
    return worst


def _cold_start(spans: Sequence[SpanData], total: float) -> str:
    load = next((span for span in spans if span.name == LOAD), None)
    if load is None or load.duration_ms < max(_WORTH_MS, _SHARE * total):
        return ""
    told = f"It came to a cold pipeline: {ms(load.duration_ms)} of {ms(total)} was the wait for its model to be loaded"
    phase, took = max(load_phases(load), key=lambda each: each[1], default=("", 0.0))
    return f"{told}, {ms(took)} of that {phase}." if phase else f"{told}."


def load_phases(load: SpanData) -> list[tuple[str, float]]:
    """What loading a model took, in milliseconds by phase, in order."""
    phases, took = (load.attributes.get(key) for key in (LOAD_PHASES, LOAD_PHASES_MS))
    if not (isinstance(phases, list) and isinstance(took, list)):
        return []
    return [
        (str(phase), float(each)) for phase, each in zip(phases, took, strict=False) if isinstance(each, (int, float))
    ]


def _failure(spans: Sequence[SpanData], total: float) -> str:
    failed = [span for span in spans if span.error is not None or "error.type" in span.attributes]
    if not failed:
        return ""
    by_id = {span.span_id: span for span in spans}
    if any(span.attributes.get("error.type") == "disconnected" for span in failed):
        reached = [span.name for stage in STAGES for span in spans if span.name == stage]
        return f"The client left after {ms(total)}" + (f", in {reached[-1]}." if reached else ".")
    named = [span for span in failed if span.name in (*STAGES, LOAD, "generate")]
    deepest = max(named or failed, key=lambda span: _depth(span, by_id))
    what = deepest.attributes.get("error.type", "error")
    message = deepest.error or next((span.error for span in failed if span.error), "")
    return f"{deepest.name} failed after {ms(total)}: {what}" + (f" ({message.removesuffix('.')})." if message else ".")


def _ratio(time: float, usual: float) -> str:
    times = time / usual
    return f"{times:.1f} x" if times < 100 else f"{times:,.0f} x"


def _depth(span: SpanData, by_id: Mapping[str, SpanData]) -> int:
    depth = 0
    while (above := by_id.get(span.parent_id)) and depth < len(by_id):
        span, depth = above, depth + 1
    return depth


def ms(value: float) -> str:
    """A duration in at most eight columns."""
    if value < 0:
        return "< 0 ms"  # a clock was set, or the trace is broken
    if value >= 10_000_000:
        return f"{value / 3.6e6:.0f} h" if value < 3.6e8 else f"{value / 8.64e7:.0f} d"
    if value >= 100_000:
        return f"{value / 1000:.0f} s"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"
