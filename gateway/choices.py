"""The choices of one answer: their deltas merged into one sequence, and what each delta makes of its choice.

Everything that comes of one choice passes its `Choice`, so whatever reads an answer's text before the client does
belongs there. Knows no HTTP, no bytes and no engine.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from gateway import objects
from gateway.backend import Delta, Stream
from gateway.objects import Held
from gateway.protocol import Operation
from pipelines.answer import deltas as answer
from pipelines.answer.boxes import BoxParser
from pipelines.answer.parser import AnswerParser
from pipelines.logprobs import Entry

Arrival = tuple[int, Delta]  # a choice's index, and what came of it


class Choice:
    """One choice, told its deltas in order: `push` for a stream, or `keep` and then `whole`."""

    def __init__(self, operation: Operation, index: int) -> None:
        self.index = index
        self._operation = operation
        self._texts: list[str] = []
        self._entries: list[Entry] = []
        self._offsets: list[int] = []
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, delta: Delta) -> Sequence[str | Held]:
        """What a stream's chunks say of it: plain text, which is the rule, or what else a chunk's choice may hold."""
        if not delta.logprobs:
            return delta.texts
        pieces: list[str | Held] = []
        for text, entries in zip(delta.texts, delta.logprobs, strict=True):
            pieces.append(self._with(self._operation.piece(text), entries, self._begin(entries)) if entries else text)
        return pieces

    def keep(self, delta: Delta) -> None:
        self._texts += delta.texts
        for entries in delta.logprobs:
            self._entries += entries
            self._offsets += self._begin(entries)

    def whole(self, finish_reason: str, *, logprobs: bool) -> Held:
        """The choice of an answer that does not stream."""
        held = self._held()
        held = self._with(held, self._entries, self._offsets) if logprobs else held
        return objects.choice(self.index, held, self.finish_reason(finish_reason))

    def finish_reason(self, engines: str) -> str:
        """As the client is told it."""
        return engines

    def _held(self) -> Held:
        return self._operation.whole("".join(self._texts))

    def _with(self, held: Held, entries: Sequence[Entry], offsets: Sequence[int]) -> Held:
        return {**held, "logprobs": self._operation.logprobs(entries, offsets)}

    def _begin(self, entries: Sequence[Entry]) -> list[int]:
        """Where each token begins in the text; one that goes on with a character, where that does."""
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(entry.bytes or b"")))
        return offsets


class ParsedChoice(Choice):
    """One whose text holds more than content: reasoning, calls, and boxes in a picture."""

    def __init__(self, operation: Operation, index: int, parser: AnswerParser) -> None:
        super().__init__(operation, index)
        self._parser = parser
        self._read: list[answer.Delta] = []
        self._called = False

    def push(self, delta: Delta) -> Sequence[str | Held]:
        """The entries of text that is held go out with what comes next."""
        self._see(delta)
        pieces: list[str | Held] = []
        for text, entries in zip_longest(delta.texts, delta.logprobs, fillvalue=()):
            self._entries += entries
            pieces += self._pieces(self._taken(self._parser.push(str(text or ""))))
        if delta.finish_reason:
            pieces += self._pieces(self._taken(self._parser.finish()))
            if self._entries:
                pieces.append(self._logged({"delta": {}}))
        return pieces

    def keep(self, delta: Delta) -> None:
        super().keep(delta)
        self._see(delta)
        self._read += self._taken(self._parser.push("".join(delta.texts)))
        if delta.finish_reason:
            self._read += self._taken(self._parser.finish())

    def finish_reason(self, engines: str) -> str:
        return "tool_calls" if self._called and engines == "stop" else engines

    def _held(self) -> Held:
        return {"message": objects.message(self._read)}

    def _see(self, delta: Delta) -> None:
        if delta.pictures and isinstance(self._parser, BoxParser):
            self._parser.pictures = delta.pictures

    def _taken(self, deltas: list[answer.Delta]) -> list[answer.Delta]:
        self._called = self._called or any(isinstance(delta, answer.Call) for delta in deltas)
        return deltas

    def _pieces(self, deltas: Sequence[answer.Delta]) -> Iterator[str | Held]:
        for delta in deltas:
            if self._entries:
                yield self._logged({"delta": objects.message_delta(delta)})
            elif isinstance(delta, answer.Content):
                yield delta.text
            else:
                yield {"delta": objects.message_delta(delta)}

    def _logged(self, held: Held) -> Held:
        entries, self._entries = self._entries, []
        return self._with(held, entries, self._begin(entries))


@dataclass
class Totals:
    """What all choices of one request came to, from the last delta of each."""

    n: int  # choices of one prompt
    last: dict[int, Delta] = field(default_factory=dict)

    def add(self, index: int, delta: Delta) -> None:
        if delta.finish_reason:
            self.last[index] = delta

    @property
    def finish_reasons(self) -> list[str]:
        return [self.last[index].finish_reason for index in sorted(self.last)]

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, whatever the number of its choices; so do those of its tokens that were cached."""
        return sum(delta.prompt_tokens for index, delta in self.last.items() if index % self.n == 0)

    @property
    def cached_tokens(self) -> int:
        return sum(delta.cached_tokens for index, delta in self.last.items() if index % self.n == 0)

    @property
    def completion_tokens(self) -> int:
        return sum(delta.completion_tokens for delta in self.last.values())

    @property
    def stages(self) -> Mapping[str, float]:
        """Milliseconds by stage: of the choice that took longest in it."""
        longest: dict[str, float] = {}
        for delta in self.last.values():
            for stage, ms in delta.stages.items():
                longest[stage] = max(ms, longest.get(stage, 0.0))
        return longest


class Merged:
    """The streams of all choices as one. Each `next` answers all that has come, in the order of the indexes."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.over = False  # the last delta of every choice has been answered
        self._streams = streams
        self._only = streams[0] if len(streams) == 1 else None
        self._asked: dict[asyncio.Future[Delta], int] = {}
        self._open = len(streams)

    async def accepted(self) -> list[Arrival]:
        """The first delta of each: a request of which one choice is refused is refused whole."""
        if self._only:
            return await self.next()
        self._ask(*range(len(self._streams)))
        await asyncio.wait(self._asked, return_when=asyncio.FIRST_EXCEPTION)
        return self._arrived()

    async def next(self) -> list[Arrival]:
        """Raises the StageError of the first choice that failed."""
        if self._only:  # the rule, and no task is needed for it
            delta = await self._only.next()
            if delta.finish_reason:
                self.over = True
            return [(0, delta)]
        await asyncio.wait(self._asked, return_when=asyncio.FIRST_COMPLETED)
        return self._arrived()

    def cancel(self) -> None:
        """Ends all of them, whatever has become of each."""
        for asked in self._asked:
            if not asked.cancel() and not asked.cancelled():
                asked.exception()  # several may have failed, and one is told
        for stream in self._streams:
            stream.cancel()

    def _arrived(self) -> list[Arrival]:
        done = sorted((index, asked) for asked, index in self._asked.items() if asked.done())
        arrivals = [(index, asked.result()) for index, asked in done]
        for _, asked in done:
            del self._asked[asked]
        self._open -= sum(bool(delta.finish_reason) for _, delta in arrivals)
        self.over = not self._open
        self._ask(*(index for index, delta in arrivals if not delta.finish_reason))
        return arrivals

    def _ask(self, *indexes: int) -> None:
        for index in indexes:
            self._asked[asyncio.ensure_future(self._streams[index].next())] = index
