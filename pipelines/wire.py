"""The JSON inside the `rows` and `events` tensors, written and read in one place for both ends.

What is said many times a message (token ids) travels as a tensor or a bare list; names are positions, not keys, and a
row that has nothing more to say than its tokens or texts ends there. Knows no Triton.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from pipelines.chat import Event, Text, Window
from pipelines.engine import Logprob
from pipelines.errors import StageError
from pipelines.generate import Poll, Row
from pipelines.logprobs import Entry, likelihood


def pack_poll(poll: Poll) -> tuple[list[int], bytes]:
    """generate → orchestrator: all token ids in a row, and whose they are."""
    ids = [id for row in poll.rows for id in row.output_ids]
    return ids, orjson.dumps({"rows": [_row(row) for row in poll.rows], "counters": poll.counters})


def unpack_poll(ids: Sequence[int], packed: bytes) -> Poll:
    message = orjson.loads(packed)
    rows, start = [], 0
    for id, count, *more in message["rows"]:
        output_ids = list(ids[start : start + count])
        start += count
        if not more:
            rows.append(Row(id, output_ids))
        else:
            finish_reason, error, stages, cached_tokens, logprobs = more
            rows.append(Row(id, output_ids, finish_reason, error, stages, cached_tokens, _read(logprobs)))
    return Poll(rows, message["counters"])


def _row(row: Row) -> tuple[Any, ...]:
    if not (row.finish_reason or row.logprobs or row.cached_tokens):
        return row.id, len(row.output_ids)
    logprobs = _written(row.logprobs)
    count = len(row.output_ids)
    return row.id, count, row.finish_reason, row.error, dict(row.stages), row.cached_tokens, logprobs


def pack_windows(windows: Sequence[Window]) -> tuple[list[int], bytes]:
    """orchestrator → postprocess."""
    ids = [id for window in windows for id in window.ids]
    return ids, orjson.dumps([_window(window) for window in windows])


def unpack_windows(ids: Sequence[int], packed: str | bytes) -> list[Window]:
    windows, start = [], 0
    for count, new, sent, stop, final, *logprobs in orjson.loads(packed):
        window_ids = list(ids[start : start + count])
        windows.append(Window(window_ids, new, sent, stop, final, _read(logprobs)))
        start += count
    return windows


def _window(window: Window) -> tuple[Any, ...]:
    ids, new, sent, stop, final, logprobs = window
    if not logprobs:
        return len(ids), new, sent, stop, final
    return len(ids), new, sent, stop, final, *_written(logprobs)


def _written(logprobs: Iterable[Logprob]) -> list[Any]:
    return [(id, likelihood(logprob), [(id, likelihood(other)) for id, other in top]) for id, logprob, top in logprobs]


def _read(logprobs: Iterable[Any]) -> Sequence[Logprob]:
    return [Logprob(id, logprob, [(id, other) for id, other in top]) for id, logprob, top in logprobs]


def pack_texts(texts: Iterable[Text]) -> bytes:
    """postprocess → orchestrator."""
    return orjson.dumps([_text(text) for text in texts])


def unpack_texts(packed: bytes) -> list[Text]:
    found = []
    for texts, drop, sent, *more in orjson.loads(packed):
        if not more:
            found.append(Text(texts, drop, sent))
        else:
            stopped, logprobs, told = more
            found.append(Text(texts, drop, sent, stopped, _entries(logprobs), told))
    return found


def _text(text: Text) -> tuple[Any, ...]:
    texts, drop, sent, stopped, logprobs, told = text
    if not (stopped or told or logprobs):
        return texts, drop, sent
    return texts, drop, sent, stopped, _plain(logprobs), told


def pack_events(events: Sequence[Event], counters: Mapping[str, int]) -> bytes:
    """orchestrator → gateway: one lane message, and when it was made. Without events it is a heartbeat."""
    return orjson.dumps(
        {"events": [_event(event) for event in events], "counters": counters, "made_ns": time.time_ns()}
    )


def unpack_events(packed: bytes) -> tuple[list[Event], dict[str, int], int]:
    """The events, the engine's counters (none if there is nothing new), and when the message was made."""
    message = orjson.loads(packed)
    events = []
    for id, texts, *more in message["events"]:
        if not more:
            events.append(Event(id, texts))
        else:
            reason, prompt_tokens, completion_tokens, stages, error, logprobs, cached_tokens, *seen = more
            failure = StageError.from_text(error, stage="orchestrator") if error else None
            entries = _entries(logprobs)
            told = (reason, prompt_tokens, completion_tokens, stages, failure, entries, cached_tokens)
            events.append(Event(id, texts, *told, *([(width, height) for width, height in sizes] for sizes in seen)))
    return events, message["counters"], message["made_ns"]


def _event(event: Event) -> tuple[Any, ...]:
    id, texts, finish_reason, prompt_tokens, completion_tokens, stages, error, logprobs, cached_tokens, seen = event
    if not (finish_reason or prompt_tokens or error or logprobs):
        return id, texts
    told = (finish_reason, prompt_tokens, completion_tokens, dict(stages), error.to_json() if error else None)
    return id, texts, *told, _plain(logprobs), cached_tokens, *((seen,) if seen else ())


def pack_entries(logprobs: Iterable[list[Entry]]) -> bytes:
    """orchestrator → the client of a direct stream: [token, bytes, logprob, [[token, bytes, logprob], …]] each."""
    return orjson.dumps([tuple(entry) for entries in logprobs for entry in entries])


def _plain(logprobs: Iterable[list[Entry]]) -> list[Any]:
    return [[tuple(entry) for entry in entries] for entries in logprobs]  # orjson takes no named tuple


def _entries(logprobs: Iterable[list[Any]]) -> list[list[Entry]]:
    return [[Entry(*entry) for entry in entries] for entries in logprobs]
