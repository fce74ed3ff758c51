"""A lean client for OpenAI endpoints: it measures 30,000 events a second and leaves the core to the server.

Knows HTTP/1.1 (through httptools) and how to read a completion or its stream of events; not what is measured.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

# Quotes inside JSON strings are escaped, so these are keys of the chunk, whatever the text holds.
_CONTENT = (b'"content":"', b'"text":"')
_EMPTY = (b'"content":""', b'"text":""')
_FINISH = b'"finish_reason":"'
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass
class Result:
    """What became of one request. `error` is a kind of few values; None means that the whole answer came."""

    error: str | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # of the response, by their names in lower case
    done: bool = False  # [DONE] was sent
    text: list[str] | None = None  # the content, piece by piece, where it is kept
    events: int = 0  # with content
    tokens: int | None = None  # by the server's own count, if it sent one
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    started: float = 0.0
    first: float | None = None  # when the first content arrived
    last: float | None = None  # … and the latest
    ended: float = 0.0
    gaps: array[float] = field(default_factory=lambda: array("d"))  # between arrivals of content
    together: int = 0  # further events of an arrival: gaps of zero


class Endpoint:
    """Where to send requests: a base URL such as http://127.0.0.1:8080/v1, and the headers to send."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL must be http://… or https://…, not {url!r}")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        self._host = parts.netloc.rpartition("@")[2]
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    def request(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] = _NONE) -> bytes:
        """The bytes of one POST."""
        content = orjson.dumps(body)
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"{self._authorization}{more}Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


class Client:
    """One request at a time over one connection, kept while the server keeps it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._connection: _Connection | None = None

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout: float = 60,
        leave_after: int | None = None,
        headers: Mapping[str, str] = _NONE,
        keep_text: bool = False,
    ) -> Result:
        """Sends one request and reads its answer; `leave_after` hangs up after so many events, on purpose."""
        request = self._endpoint.request(path, body, headers)
        result = Result(text=[] if keep_text else None, started=time.perf_counter())
        try:
            await asyncio.wait_for(self._exchange(request, result, leave_after), timeout)
        except asyncio.TimeoutError:
            result.error = "timeout"
        except OSError as error:
            result.error = f"connect: {type(error).__name__}"
        result.ended = time.perf_counter()
        if leave_after is not None or not (self._connection and self._connection.whole):
            self.close()  # but for a refusal, which is an answer like any other
        return result

    async def _exchange(self, request: bytes, result: Result, leave_after: int | None) -> None:
        kept = self._connection
        if kept is not None and not kept.closed:
            await kept.exchange(request, result, leave_after)
            if not kept.unanswered:
                return
            result.error = None  # the server closed a connection that it had kept: not this request's failure
        loop = asyncio.get_running_loop()
        endpoint = self._endpoint
        _, connection = await loop.create_connection(_Connection, endpoint.host, endpoint.port, ssl=endpoint.ssl)
        self._connection = connection
        await connection.exchange(request, result, leave_after)

    def close(self) -> None:
        if self._connection:
            self._connection.abort()
            self._connection = None


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.closed = False
        self.unanswered = False  # it was closed before the first byte of an answer
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._result = Result()
        self._done: asyncio.Future[None] | None = None
        self._leave_after: int | None = None
        self._streaming = False
        self.whole = False  # the whole response was read
        self._body: list[bytes] = []
        self._tail = b""

    async def exchange(self, request: bytes, result: Result, leave_after: int | None) -> None:
        assert self._transport is not None
        self._result = result
        self._leave_after = leave_after
        self._parser = httptools.HttpResponseParser(self)
        self._streaming = False
        self.whole = False
        self._body.clear()
        self._tail = b""
        self.unanswered = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done = None

    def abort(self) -> None:
        self.closed = True
        if self._transport:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"http: {type(error).__name__}")
            return
        if self._streaming and self._body:
            self._events(time.perf_counter())
        if self.whole:
            self._complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is not None:
            self.unanswered = self._result.status == 0
            done = self._result.done  # a body may end with its connection
            self._end(self._result.error or (None if done else "closed early"))

    # httptools' side

    def on_headers_complete(self) -> None:
        self._result.status = self._parser.get_status_code()
        self._streaming = self._result.headers.get("content-type", "").startswith("text/event-stream")
        if not self._parser.should_keep_alive():
            self.closed = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._result.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.whole = True

    # what is in a body

    def _events(self, now: float) -> None:
        """Counts the whole events of one read; those that are not plain content are parsed."""
        data = b"".join((self._tail, *self._body))
        self._body.clear()
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        whole, end, self._tail = data.rpartition(b"\n\n")
        whole += end
        content = sum(map(whole.count, _CONTENT)) - sum(map(whole.count, _EMPTY))
        if content != whole.count(b"\n\n") or _FINISH in whole or self._result.text is not None:
            content = sum(self._event(event) for event in whole.split(b"\n\n") if event)
        if not content:
            return
        result = self._result
        if result.last is None:
            result.first = now
        else:
            result.gaps.append(now - result.last)
        result.last = now
        result.together += content - 1
        result.events += content
        if self._leave_after is not None and result.events >= self._leave_after:
            self._end(None)

    def _event(self, event: bytes) -> bool:
        """Notes what an event says; whether it has content."""
        lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
        data = b"\n".join(line[5:].strip() for line in lines)
        if not data:  # a comment
            return False
        if data == b"[DONE]":
            self._result.done = True
            return False
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            self._result.error = "bad event"
            return False
        return _note(chunk, self._result)

    def _complete(self) -> None:
        result = self._result
        if not 200 <= result.status < 300:
            self._end(f"http {result.status}")
        elif not self._streaming:
            try:
                _note(orjson.loads(b"".join(self._body)), result)
            except orjson.JSONDecodeError:
                result.error = "bad body"
            result.first = result.last = time.perf_counter()
            self._end(result.error)
        else:
            self._end(result.error or (None if result.done else "no [DONE]"))

    def _end(self, error: str | None) -> None:
        if self._done is not None and not self._done.done():
            self._result.error = error
            self._done.set_result(None)


def _note(chunk: Any, result: Result) -> bool:
    """Takes a chunk's or a completion's usage, finish reason and error; whether there is content."""
    if not isinstance(chunk, dict):
        result.error = "bad event"
        return False
    if chunk.get("error"):
        error = chunk["error"]
        kind = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
        result.error = f"error event: {kind or 'unknown'}"
    if usage := chunk.get("usage"):
        result.tokens = usage.get("completion_tokens")
        result.prompt_tokens = usage.get("prompt_tokens")
    content = False
    for choice in chunk.get("choices") or ():
        result.finish_reason = choice.get("finish_reason") or result.finish_reason
        part = choice.get("delta") or choice.get("message") or choice
        text = part.get("content") or part.get("text")
        if text and result.text is not None:
            result.text.append(text)
        content = content or bool(text)
    return content
