"""A trace as lines of text: a tree, durations, and bars on one axis. Pure: knows no terminal and no gateway.

Nothing of a trace is trusted: what a terminal would obey is shown as a dot.
"""

from __future__ import annotations

import textwrap
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from observability.explain import explain, load_phases, ms, slow_stage
from observability.spans import SpanData

NARROWEST = 40
_DURATION = 8
_MOST_NAMED = 4  # of those who shared the batch, and of pictures


@dataclass(frozen=True)
class Signs:
    """What lines are drawn with."""

    bar: str = "█"
    sliver: str = "▏"
    branch: str = "├ "
    last: str = "└ "
    through: str = "│ "
    error: str = "✗"
    event: str = "•"
    times: str = "×"
    most: str = "≤"
    cut: str = "…"


UNICODE = Signs()
ASCII = Signs("#", "|", "|-", "`-", "| ", "!", "*", "x", "<=", "~")


@dataclass(frozen=True)
class Colours:
    """Escape sequences, all empty where there is no colour."""

    plain: str = ""
    title: str = ""
    bar: str = ""
    slow: str = ""
    error: str = ""
    faint: str = ""


NO_COLOURS = Colours()
ANSI = Colours("\x1b[0m", "\x1b[1m", "\x1b[36m", "\x1b[33m", "\x1b[31m", "\x1b[2m")


def draw(
    spans: Sequence[SpanData],
    usual: Mapping[str, float],
    requests: int,
    *,
    width: int = 80,
    colours: Colours = NO_COLOURS,
    signs: Signs = UNICODE,
) -> list[str]:
    """`usual` is the median by stage of so many recent requests of that pipeline. No line is wider than `width`."""
    width = max(NARROWEST, width)
    sentence = shown(explain(spans, usual, requests))
    lines = [f"{colours.title}{line}{colours.plain}" for line in textwrap.wrap(sentence, width)]
    if not spans:
        return lines
    slow = slow_stage(spans, usual) if requests else ""
    rows = list(_tree(spans, signs))
    label_width = min(max(display_width(label) for label, _, _ in rows), max(16, width * 2 // 5))
    bar_width = width - label_width - _DURATION - 3
    began, ended = min(span.start_ns for span in spans), max(span.end_ns for span in spans)
    lines += ["", *_head(rows[0][2], width, colours)]
    axis = ms((ended - began) / 1e6)
    lines.append(" " * (label_width + _DURATION + 3) + f"{colours.faint}0{axis.rjust(bar_width - 1)}{colours.plain}")
    for label, indent, span in rows:
        failed = span.error is not None or "error.type" in span.attributes
        colour = colours.error if failed else colours.slow if span.name == slow else colours.bar
        first, bar = _bar(span, began, ended, bar_width, signs)
        text = fit(label, label_width, signs.cut)
        line = f"{text} {ms(span.duration_ms).rjust(_DURATION)}  {' ' * first}{colour}{bar}{colours.plain}"
        lines.append(line if colours.plain else line.rstrip())
        for note, marks_error in _notes(span, began, signs):
            shade = colours.error if marks_error else colours.faint
            room = width - display_width(indent)
            lines.append(f"{indent}{shade}{fit(note, room, signs.cut).rstrip()}{colours.plain}")
    return lines


def _head(root: SpanData, width: int, colours: Colours) -> Iterator[str]:
    """Whose trace it is."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(root.start_ns / 1e9))
    yield f"{colours.faint}{fit(f'trace {root.trace_id}  {when}', width).rstrip()}{colours.plain}"
    if request_id := root.attributes.get("triptych.request_id"):
        status = root.attributes.get("http.response.status_code", "")
        line = fit(f"request {shown(str(request_id))}  {status}", width).rstrip()
        yield f"{colours.faint}{line}{colours.plain}"


def _tree(spans: Sequence[SpanData], signs: Signs) -> Iterator[tuple[str, str, SpanData]]:
    """Each span below its parent, in order of time: its label, the indent of what is told below it, and the span."""
    ids = {span.span_id for span in spans}
    children: dict[str, list[SpanData]] = {}
    in_time = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    for span in in_time:
        children.setdefault(span.parent_id if span.parent_id in ids else "", []).append(span)
    seen: set[int] = set()

    def below(siblings: Sequence[SpanData], indent: str, *, top: bool) -> Iterator[tuple[str, str, SpanData]]:
        new = [span for span in siblings if id(span) not in seen]
        seen.update(map(id, new))
        for span in new:
            last = span is new[-1]
            sign = "" if top else signs.last if last else signs.branch
            deeper = "" if top else indent + ("  " if last else signs.through)
            more = span.span_id in children
            yield indent + sign + shown(span.name), deeper + (signs.through if more else "  "), span
            yield from below(children.get(span.span_id, ()), deeper, top=False)

    yield from below(children.get("", ()), "", top=True)
    for span in in_time:  # those that are each other's parents
        yield from below([span], "", top=True)


def _bar(span: SpanData, began: int, ended: int, width: int, signs: Signs) -> tuple[int, str]:
    """The column in which it starts, and the bar."""
    scale = width / max(1, ended - began)
    first = min(width - 1, int((span.start_ns - began) * scale))
    length = (span.end_ns - span.start_ns) * scale
    if length < 0.5:
        return first, signs.sliver
    return first, signs.bar * max(1, min(width - first, round(length)))


def _notes(span: SpanData, began: int, signs: Signs) -> Iterator[tuple[str, bool]]:
    """What is told below a span, and whether it is an error."""
    kind = span.attributes.get("error.type")
    if span.error is not None or kind:
        what = ": ".join(str(word) for word in (kind, span.error) if word)
        yield f"{signs.error} {shown(what or 'error')}", True
    for event in span.events:
        yield f"{signs.event} {shown(event.name)} at {ms((event.at_ns - began) / 1e6)}", False
    if phases := load_phases(span):
        yield f"{signs.event} {', '.join(f'{phase} {ms(took)}' for phase, took in phases)}", False
    if span.links:
        named = ", ".join(link.trace_id[:8] for link in span.links[:_MOST_NAMED])
        more = f" and {len(span.links) - _MOST_NAMED} more" if len(span.links) > _MOST_NAMED else ""
        yield f"{signs.event} in a batch with {named}{more}", False
    if pictures := _pictures(span.attributes):
        yield f"{signs.event} {shown(pictures)}", False
    counts, bounds = span.attributes.get("triptych.gap_ms.counts"), span.attributes.get("triptych.gap_ms.bounds")
    if isinstance(counts, list) and isinstance(bounds, list) and any(counts) and len(counts) == len(bounds) + 1:
        edges = [f"{signs.most}{bound}" for bound in bounds] + [f">{bounds[-1]}"]
        gaps = [f"{edge} ms {signs.times}{count}" for edge, count in zip(edges, counts, strict=True) if count]
        yield f"{signs.event} between tokens {', '.join(gaps)}", False


def _pictures(told: Mapping[str, object]) -> str:
    """What was read, what was decoded, and what became of it, which the model's processor makes in `tokenize`."""
    if isinstance(size := told.get("triptych.image.bytes"), int):
        return f"{_bytes(size)}, pictures: {told.get('triptych.image.count')}"
    if isinstance(size := told.get("triptych.features.bytes"), int):
        return f"{_bytes(size)} of what the model sees"
    formats, widths, heights = (told.get(f"triptych.image.{name}") for name in ("formats", "widths", "heights"))
    if not (isinstance(formats, list) and isinstance(widths, list) and isinstance(heights, list)):
        return ""
    each = [f"{kind} {width} x {height}" for kind, width, height in zip(formats, widths, heights, strict=False)]
    more = f" and {len(each) - _MOST_NAMED} more" if len(each) > _MOST_NAMED else ""
    return ", ".join(each[:_MOST_NAMED]) + more


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1_000_000 else f"{size / 1000:.1f} kB" if size >= 1000 else f"{size} B"


def shown(text: str) -> str:
    """Without what a terminal would obey, or reorder the line for."""
    return "".join(char if char.isprintable() else "·" for char in text)


def display_width(text: str) -> int:
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fit(text: str, width: int, cut: str = "…") -> str:
    """Exactly so many columns: padded, or cut with a sign that says so."""
    if (used := display_width(text)) <= width:
        return text + " " * (width - used)
    kept, used = "", 0
    for char in text:
        if used + _columns(char) > width - 1:
            break
        kept, used = kept + char, used + _columns(char)
    return kept + cut + " " * (width - 1 - used)
