"""The third stage: token ids to text, in a stream or at once, cut at the earliest stop string.

It holds no state between calls. For each answer the caller keeps a window: the last few ids, and `sent`, how
much of their text is out already; both come back, shorter, from every call. Text is released when it can no
longer change, so the stream is the full decode, whatever the chunks. Knows no Triton and no engine;
`pipelines.detokenizer` knows the tokenizers.

The earliest stop string is the one that ends first (of those, the one that starts first): the one a reader of
a stream would see completed first, so that the cut does not depend on the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from pipelines import detokenizer, logprobs
from pipelines.answer.formats import AnswerFormat
from pipelines.chat import Text, Window, finish_reason_of
from pipelines.vocabulary import Vocabulary

# A flag in `sent`: the window does not begin where the answer does. Some tokenizers spell the first token
# otherwise (Llama 2 strips a leading space), and without the flag a window would have to carry a token only
# to tell.
_STARTED = 1 << 30


class Delta(NamedTuple):
    """`text` is newly released; `texts` is the same, one for each new id, in per-token mode.

    (With no new id, `texts` is empty and only `text` has what a final call released.) The caller drops `drop`
    ids from the window's start and keeps `sent` as it is. `stopped`: a stop string is complete, and nothing
    more comes.
    """

    text: str
    texts: list[str]
    drop: int
    sent: int
    stopped: bool = False


class Postprocess:
    def __init__(self, vocabulary: Vocabulary, keep: Collection[str] = ()) -> None:
        """`keep`: special tokens that are text, because they mark calls."""
        self._detok = detokenizer.load(vocabulary, keep)
        self._entry = self._detok.table.__getitem__
        self._name = vocabulary.token

    @classmethod
    def load(cls, home: Path) -> Postprocess:
        return cls(Vocabulary.load(home), AnswerFormat.load(home).marks)

    def text(self, window: Window, *, per_token: bool) -> Text:
        """What one request's window releases, as one text or, `per_token`, one for each new id."""
        first = len(window.ids) - window.new if per_token and window.new else None
        delta = self.delta(window.ids, window.sent, stop=window.stop, final=window.final, per_token_from=first)
        texts = delta.texts if first is not None else [delta.text] if delta.text else []
        if not window.logprobs:
            return Text(texts, delta.drop, delta.sent, delta.stopped)
        texts = texts or [""]
        flag, sent = window.sent & _STARTED, window.sent & ~_STARTED
        entries, told = logprobs.tell(
            window.ids,
            window.logprobs,
            self._detok.stream(bool(flag)),
            self._name,
            list(accumulate(map(len, texts), initial=sent))[1:],
            shown=len(window.ids) if window.final and not delta.stopped else delta.drop,
            over=delta.stopped,
        )
        return Text(texts, delta.drop, delta.sent, delta.stopped, entries, told)

    def delta(
        self,
        ids: Sequence[int],
        sent: int,
        *,
        stop: Sequence[str] = (),
        final: bool = False,
        per_token_from: int | None = None,
    ) -> Delta:
        """What the window `ids` releases beyond `sent`; `final`: no id follows, so everything is released.

        `per_token_from`: from there on the ids are new, and each gets its own text. Which text does not depend
        on the chunks either: one that was held goes to the id that settles it.
        """
        if sent == _STARTED or (sent == 0 and self._detok.uniform):
            plain = self._plain(ids, sent, stop, per_token_from)
            if plain is not None:
                return plain
        return self._exact(ids, sent, stop, final, per_token_from)

    def full(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The whole answer at once: what the stream of the same ids adds up to."""
        return self.delta(ids, 0, stop=stop, final=True).text

    def answer(self, ids: Sequence[int], stop: Sequence[str], finish_reason: str) -> tuple[str, str]:
        """The same, and why it ended: the engine's `finish_reason`, but for a stop string that only its end settles."""
        delta = self.delta(ids, 0, stop=stop, final=True)
        return delta.text, finish_reason_of(finish_reason, delta.stopped)

    def stop_checker(self, stop: Sequence[str]) -> Callable[[int], bool]:
        """For the engine: told each new id in turn, it answers whether a stop string is complete.

        Generation ends at that id. A stop string in text that may still change does not count yet; `full` and
        `delta` find it in the same place, for the settled text is the beginning of the full decode.
        """
        push = self._detok.stream(False).push
        reach = max(map(len, stop), default=1) - 1
        tail = ""  # what a stop string may have begun in

        def stops_at(token_id: int) -> bool:
            nonlocal tail
            piece = push(token_id)
            if not piece:
                return False
            text = tail + piece
            if find_stop(text, stop) is not None:
                return True
            tail = text[-reach:] if reach else ""
            return False

        return stops_at

    def _plain(self, ids: Sequence[int], sent: int, stop: Sequence[str], per_token_from: int | None) -> Delta | None:
        """The common case: every id is text by itself, and no stop string begins. None if it is another."""
        if per_token_from:
            return None
        texts = list(map(self._entry, ids))
        try:
            text = "".join(texts)  # type: ignore[arg-type]  # bytes and None raise, which is the check
        except TypeError:
            return None
        for sequence in stop:
            if sequence[0] in text:
                return None
        return Delta(text, [] if per_token_from is None else texts, len(texts), sent)  # type: ignore[arg-type]

    def _exact(
        self, ids: Sequence[int], sent: int, stop: Sequence[str], final: bool, per_token_from: int | None
    ) -> Delta:
        pieces, marks = self._settle(ids, bool(sent & _STARTED), final, everywhere=bool(stop))
        flag, sent = sent & _STARTED, sent & ~_STARTED
        new = len(ids) if per_token_from is None else per_token_from
        release = _Release(stop, "".join(pieces[:new])[sent:])
        # Without new pieces the held text itself is looked at: all of it, or what was held and is now final.
        texts = [release.push(piece, final and index == len(ids)) for index, piece in enumerate(pieces[new:], new + 1)]
        text = "".join(texts) if texts else release.push("", final)
        released = sent + len(text)
        drop = dropped = 0
        for mark in marks:
            if mark.settled > released:
                break
            drop, dropped = mark.ids, mark.settled - mark.again
            flag = _STARTED if mark.started and not self._detok.uniform else 0
        return Delta(text, texts, drop, flag | (released - dropped), release.stopped)

    def _settle(
        self, ids: Sequence[int], started: bool, final: bool, everywhere: bool
    ) -> tuple[list[str], list[_Mark]]:
        """The text that each id settles, and where the window may be cut: everywhere, or in the last place only."""
        stream = self._detok.stream(started)
        pieces: list[str] = []
        marks: list[_Mark] = []
        settled = 0
        for token_id in ids:
            piece = stream.push(token_id)
            pieces.append(piece)
            settled += len(piece)
            if (everywhere or len(pieces) == len(ids)) and (context := stream.context) is not None:
                marks.append(_Mark(len(pieces) - context[0], settled, context[1], stream.started))
        if final and pieces:
            pieces[-1] += stream.flush()
        return pieces, marks


class _Mark(NamedTuple):
    """The window may lose its first `ids` once `settled` characters are out, of which it shows `again` so many."""

    ids: int
    settled: int
    again: int
    started: bool


class _Release:
    """Lets settled text out, but for what is or may become a stop string."""

    def __init__(self, stop: Sequence[str], held: str) -> None:
        self._stop = stop
        self._held = held
        self.stopped = False

    def push(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        end = find_stop(text, self._stop)
        if end is not None:
            self.stopped = True
        else:
            end = len(text) if final else len(text) - possible_stop(text, self._stop)
        self._held = text[end:]
        return text[:end]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins: the one that ends first and, of those, begins first."""
    found: tuple[int, int] | None = None
    for sequence in stop:
        start = text.find(sequence)
        if start >= 0:
            place = (start + len(sequence), start)
            found = place if found is None else min(found, place)
    return None if found is None else found[1]


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of the text that is the beginning of a stop string."""
    longest = 0
    for sequence in stop:
        start = max(0, len(text) - len(sequence) + 1)
        while (start := text.find(sequence[0], start)) >= 0:
            if sequence.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest
