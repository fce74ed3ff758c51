"""An answer's text, piece by piece, into content, reasoning and calls: one `Parser` for each answer.

However the text is cut, the result is the same. What may be the beginning of a marker waits; white space beside a
marker belongs to it. A call that turns out to be none is content, marker included; where it fails after it has begun,
what follows is content. Only where the answer's end cuts a call short is some of its syntax left out. Knows no model's
markers: `formats` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines.answer.calls import Sink
from pipelines.answer.deltas import Arguments, Call, Content, Delta, Reasoning, merged, new_call_id
from pipelines.answer.json_text import PLAIN, Malformed, Reading

ReadCall = Callable[[str, Sink], Reading]  # given the first character behind the marker


class AnswerParser(Protocol):
    """One answer's text, from its first piece to its end."""

    def push(self, text: str) -> list[Delta]:
        """What this piece settles."""

    def finish(self) -> list[Delta]:
        """The rest: nothing follows."""


class Parser:
    """`think`: the markers around reasoning, if the model marks it; `thinking`: the prompt holds the first already.

    `opens`: what begins a call, and how to read it; "{" does so at the answer's beginning only. `silent`: markers that
    are left out where no call is read.
    """

    def __init__(
        self,
        think: tuple[str, str] | None = None,
        *,
        thinking: bool = False,
        opens: Mapping[str, ReadCall] | None = None,
        silent: Sequence[str] = (),
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.schemas = schemas or {}
        self._think = think
        self._opens = dict(opens or {})
        self._bare = self._opens.pop("{", None)
        self._silent = tuple(silent)
        self._pending = ""
        self._out: list[Delta] = []
        self._calls = 0
        self._fresh = True  # nothing but white space has come
        self._trim = thinking  # white space that comes now stands beside a marker
        self._thinking = thinking
        self._reading: Reading | None = None
        self._read = ""  # of a call: what may have to be given back
        self._given = ""  # ahead of that, as content: white space, the marker
        self._passed = False  # the character under way has passed something on

    def push(self, text: str) -> list[Delta]:
        self._pending += text
        self._step()
        return self._taken()

    def finish(self) -> list[Delta]:
        self._step()
        while self._reading:
            self._end_of_text()
            self._step()
        if self._thinking:
            self._out.append(Reasoning(self._pending.rstrip()))
        elif not (self._trim and self._pending.isspace()):
            self._content(self._pending)
        self._pending = ""
        return self._taken()

    def begin(self, name: str) -> None:
        self._out.append(Call(self._calls, new_call_id(), name))
        self._calls += 1
        self._passed = True

    def arguments(self, text: str) -> None:
        self._out.append(Arguments(self._calls - 1, text))
        self._passed = True

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return merged(out)

    def _step(self) -> None:
        """As far as the pending text goes."""
        while self._pending:
            if self._reading:
                self._read_call()
            elif not (self._reason() if self._thinking else self._text()):
                return

    def _reason(self) -> bool:
        """Answers whether there is more to do."""
        assert self._think is not None
        opened, closed = self._think
        if self._trim:
            self._pending = self._pending.lstrip()
            if opened.startswith(self._pending[: len(opened)]):
                if len(self._pending) < len(opened):
                    return False
                self._pending = self._pending[len(opened) :]  # the prompt holds it, and the model repeats it
                return True
            self._trim = False
        end = self._pending.find(closed)
        if end >= 0:
            self._out.append(Reasoning(self._pending[:end].rstrip()))
            self._pending = self._pending[end + len(closed) :]
            self._thinking, self._trim = False, True
            return True
        self._out.append(Reasoning(self._cut([closed])))
        return False

    def _text(self) -> bool:
        if self._trim:
            self._pending = self._pending.lstrip()
            self._trim = not self._pending
        if self._fresh:
            body = self._pending.lstrip()
            if not body:
                return False
            if self._bare and body[0] == "{":
                self._open(len(self._pending) - len(body), "{", self._bare)
                return True
            if self._think and self._think[0].startswith(body[: len(self._think[0])]):
                if len(body) < len(self._think[0]):
                    return False
                self._pending = body[len(self._think[0]) :]
                self._thinking = self._trim = True
                return True
        found = min(
            ((at, mark) for mark in (*self._opens, *self._silent) if (at := self._pending.find(mark)) >= 0),
            default=None,
        )
        if found is None:
            self._content(self._cut([*self._opens, *self._silent]))
            return False
        at, mark = found
        if mark in self._opens:
            self._open(at, mark, self._opens[mark])
        else:
            self._content(self._pending[:at])
            self._pending = self._pending[at + len(mark) :]
        return True

    def _cut(self, marks: Sequence[str]) -> str:
        """Takes off the pending text what no marker can begin in, nor stand behind."""
        text = self._pending
        end = len(text)
        for mark in marks:
            start = max(0, len(text) - len(mark) + 1)
            while (start := text.find(mark[0], start)) >= 0:
                if mark.startswith(text[start:]):
                    end = min(end, start)
                    break
                start += 1
        end = len(text[:end].rstrip()) if marks else end
        self._pending = text[end:]
        return text[:end]

    def _content(self, text: str) -> None:
        if text:
            self._out.append(Content(text))
            self._fresh = self._fresh and text.isspace()

    def _open(self, at: int, mark: str, read: ReadCall) -> None:
        """A call begins with `mark`."""
        before = self._pending[:at].rstrip()
        self._content(before)
        self._given = self._pending[len(before) : at] + mark
        self._pending = self._pending[at + len(mark) :]
        self._reading = _started(read, self)
        if mark == "{":  # which is the call's own
            self._reading.send(mark)

    def _read_call(self) -> None:
        assert self._reading
        text, self._pending = self._pending, ""
        index, in_string = 0, False
        while index < len(text):
            run = PLAIN.match(text, index) if in_string else None
            char = run[0] if run else text[index]
            index += len(char)
            self._read += char
            self._passed = False
            try:
                in_string = bool(self._reading.send(char))
            except StopIteration as end:
                self._end_call()
                self._pending = end.value + text[index:]
                return
            except Malformed:
                self._pending = self._given_back(char) + text[index:]
                return
            if self._passed:
                self._given = self._read = ""

    def _end_of_text(self) -> None:
        """Inside a call. One that has begun, or that follows another, can only be one that was cut."""
        assert self._reading
        try:
            self._reading.send("")
        except StopIteration:
            self._end_call()
        except Malformed:
            if self._given and not self._calls:
                self._pending = self._given_back("")
            else:
                self._end_call()

    def _end_call(self) -> None:
        self._reading = None
        self._given = self._read = ""
        self._fresh, self._trim = False, True

    def _given_back(self, char: str) -> str:
        """The call is none, or no longer one: its marker is content, and what was read behind it may be anything."""
        given, read = ("", char) if self._passed else (self._given, self._read)
        self._end_call()
        self._trim = False
        self._content(given)
        return read


def _started(read: ReadCall, sink: Sink) -> Reading:
    def reading() -> Reading:
        return (yield from read((yield), sink))

    started = reading()
    next(started)
    return started
