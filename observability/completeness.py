"""Whether a trace is whole: what a user would see as broken or missing in it, in words. Pure.

`check` knows the tree of a request (docs/observability.md), not what any attribute means but those that say how it
ended. A new shape of request (pictures, cold starts) is a further set of names to `expect`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from observability.keeping import TRITON, subtree
from observability.spans import SpanData

MOST_SPANS = 25
TOLERANCE_MS = 2.0
CANCEL_MS = 2000.0  # the stages hear of a cancelled request after its spans in the gateway have ended
_CLOSE_NS = int(TOLERANCE_MS * 1e6)
IN_TURN = ("admission", "preprocess", "queue", "prefill", "decode")  # one ends before the next begins

GATEWAY = frozenset({"admission"})
STAGES = frozenset({"preprocess", "render", "tokenize", "generate", "queue", "prefill", "decode", "postprocess"})


def check(spans: Sequence[SpanData], *, expect: Collection[str] = (), remote_parent: str = "") -> list[str]:
    """What is wrong with the trace of one request; empty if nothing is.

    `expect` are names that must be there, `remote_parent` the span id of a caller outside.
    """
    return list(_complaints(spans, set(expect), remote_parent))


def _complaints(spans: Sequence[SpanData], expect: set[str], remote_parent: str) -> Iterator[str]:
    by_id = {span.span_id: span for span in spans}
    if len(by_id) < len(spans):
        yield "two spans have the same id"
    if len({span.trace_id for span in spans}) != 1:
        yield f"{len({span.trace_id for span in spans})} traces"
    if (count := sum(not span.name.startswith(TRITON) for span in spans)) > MOST_SPANS:
        yield f"{count} spans, of {MOST_SPANS} at most"
    if missing := expect - {span.name for span in spans}:
        yield f"no span is named {', '.join(sorted(missing))}"
    roots = [span for span in spans if not span.parent_id or span.parent_id == remote_parent]
    if len(roots) != 1:
        yield f"{len(roots)} roots: {', '.join(span.name for span in roots)}"
        return
    overhang = CANCEL_MS if _was_cancelled(spans) else TOLERANCE_MS
    for span in spans:
        if span.end_ns < span.start_ns:
            yield f"{span.name} ends before it starts"
        if span is roots[0]:
            continue
        if span.parent_id not in by_id:
            yield f"{span.name} is an orphan: there is no span {span.parent_id}"
            continue
        above = by_id[span.parent_id]
        early, late = (above.start_ns - span.start_ns) / 1e6, (span.end_ns - above.end_ns) / 1e6
        if early > TOLERANCE_MS or late > overhang:
            yield f"{span.name} is outside {above.name} by {max(early, late):.2f} ms"
    if len(subtree(spans, roots[0].span_id)) < len(by_id):
        yield "some spans are not below the root"
    elif not _was_cancelled(spans):
        yield from _times(roots[0], spans, by_id)


def _times(root: SpanData, spans: Sequence[SpanData], by_id: Mapping[str, SpanData]) -> Iterator[str]:
    """Stage times plus the gaps between them are the whole, for each choice: no time is told twice, none is lost."""
    before = [span for span in spans if span.name in IN_TURN and _choice(span, by_id) is None]
    choices: dict[str, list[SpanData]] = {}
    for span in spans:
        if span.name in IN_TURN and (choice := _choice(span, by_id)) is not None:
            choices.setdefault(choice, []).append(span)
    for own in choices.values() or [[]]:
        begins = min((span.start_ns for span in own), default=root.end_ns)
        earlier = {  # each choice has a preprocess of its own: the last one before it
            span.name: span
            for span in sorted(before, key=lambda span: span.end_ns)
            if span.end_ns <= begins + _CLOSE_NS
        }
        turns = sorted([*(earlier.values()), *own], key=lambda span: IN_TURN.index(span.name))
        sums, reached = 0, root.start_ns
        for span in turns:
            sums += max(0, span.start_ns - reached) + (span.end_ns - span.start_ns)
            reached = span.end_ns
        sums += max(0, root.end_ns - reached)
        off = (sums - (root.end_ns - root.start_ns)) / 1e6
        if abs(off) > TOLERANCE_MS:
            yield f"stages and gaps are {off:+.2f} ms off the total of {root.name}"


def _choice(span: SpanData, by_id: Mapping[str, SpanData]) -> str | None:
    """The id of the generate span that it is part of; of several choices each has its own."""
    above = by_id.get(span.parent_id)
    return above.span_id if above is not None and above.name == "generate" else None


def _was_cancelled(spans: Sequence[SpanData]) -> bool:
    return any(span.attributes.get("error.type") == "disconnected" for span in spans)
