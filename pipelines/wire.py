"""The JSON inside the `rows` and `events` tensors, written and read in one place for both ends.

What is said many times a message (token ids) travels as a tensor or a bare list; names are positions, not keys.
Knows no Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from pipelines.chat import Event, Text, Window
from pipelines.errors import StageError
from pipelines.generate import Poll, Row


def pack_poll(poll: Poll) -> tuple[list[int], bytes]:
    """generate → orchestrator: all token ids in a row, and whose they are."""
    ids = [id for row in poll.rows for id in row.output_ids]
    rows = [(row.id, len(row.output_ids), row.finish_reason, row.error, row.stages) for row in poll.rows]
    return ids, orjson.dumps({"rows": rows, "counters": poll.counters})


def unpack_poll(ids: Sequence[int], packed: bytes) -> Poll:
    message = orjson.loads(packed)
    rows, start = [], 0
    for id, count, finish_reason, error, stages in message["rows"]:
        rows.append(Row(id, list(ids[start : start + count]), finish_reason, error, stages))
        start += count
    return Poll(rows, message["counters"])


def pack_windows(windows: Sequence[Window]) -> tuple[list[int], bytes]:
    """orchestrator → postprocess."""
    ids = [id for window in windows for id in window.ids]
    return ids, orjson.dumps([(len(w.ids), w.new, w.sent, w.stop, w.final) for w in windows])


def unpack_windows(ids: Sequence[int], packed: str | bytes) -> list[Window]:
    windows, start = [], 0
    for count, new, sent, stop, final in orjson.loads(packed):
        windows.append(Window(list(ids[start : start + count]), new, sent, stop, final))
        start += count
    return windows


def pack_texts(texts: Iterable[Text]) -> bytes:
    """postprocess → orchestrator."""
    return orjson.dumps([(text.texts, text.drop, text.sent) for text in texts])


def unpack_texts(packed: bytes) -> list[Text]:
    return [Text(*row) for row in orjson.loads(packed)]


def pack_events(events: Sequence[Event], counters: Mapping[str, int]) -> bytes:
    """orchestrator → gateway: one lane message. Without events it is a heartbeat."""
    return orjson.dumps({"events": [_event(event) for event in events], "counters": counters})


def unpack_events(packed: bytes) -> tuple[list[Event], dict[str, int]]:
    message = orjson.loads(packed)
    events = []
    for id, texts, finish_reason, prompt_tokens, completion_tokens, stages, error in message["events"]:
        failure = StageError.from_text(error, stage="orchestrator") if error else None
        events.append(Event(id, texts, finish_reason, prompt_tokens, completion_tokens, stages, failure))
    return events, message["counters"]


def _event(event: Event) -> tuple[Any, ...]:
    error = event.error.to_json() if event.error else None
    return (
        event.id,
        event.texts,
        event.finish_reason,
        event.prompt_tokens,
        event.completion_tokens,
        event.stages,
        error,
    )
