"""Log probabilities as a client reads them: each token's spelling and bytes, and which tokens the answer shows.

An entry goes out with the text of its token. A token that the text does not show has none: the end token, another
special one, one that a stop string cuts away whole. Knows no stop strings: only how much text is out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the gateway reads entries too, and has no numpy
    from pipelines.detokenizer import Stream
    from pipelines.engine import Logprob

UNLIKELY = -9999.0  # OpenAI, logprob: "the value -9999.0 is used to signify that the token is very unlikely"

# A token as text, its UTF-8, its log probability. The text of one that is part of a character is its bytes as escapes,
# as OpenAI writes them; the bytes of one that no text shows (a special token) are None.
Alternative = tuple[str, "list[int] | None", float]


class Entry(NamedTuple):
    """One token of an answer, and the likeliest tokens in its place."""

    token: str
    bytes: list[int] | None
    logprob: float
    top: list[Alternative]


class Told(NamedTuple):
    """`entries` for each text; the caller forgets the first `told` of those that wait."""

    entries: list[list[Entry]]
    told: int


def tell(
    ids: Sequence[int],
    waiting: Sequence[Logprob],
    stream: Stream,
    name: Callable[[int], str | None],
    reach: Sequence[int],
    *,
    shown: int,
    over: bool,
) -> Told:
    """The entries that go with the texts that a window releases, of which there is at least one.

    `waiting` are of the last of `ids`; `stream` begins where the window does. `reach`: how far the window's text is
    out with each of the texts. The first `shown` ids are out whole; if it is `over`, what is not out never will be.
    """
    first = len(ids) - len(waiting)
    entries: list[list[Entry]] = [[] for _ in reach]
    text = settled = base = begun = 0
    for index, token_id in enumerate(ids):
        data = stream.spell(token_id)
        if not stream.pending:
            base, begun = settled, 0
        # Where its text begins: in the character that is not complete yet if it continues that one.
        start = base + begun - (1 if data and begun and _continues(data[0]) else 0)
        begun += sum(not _continues(byte) for byte in data or b"")
        if index >= first:
            while text < len(reach) and reach[text] < start + bool(data):
                text += 1
            if text == len(reach) and index >= shown:
                return Told(entries, len(waiting) if over else index - first)
            if data is not None:
                entries[min(text, len(reach) - 1)].append(_entry(waiting[index - first], token_id, stream, name))
        settled += len(stream.push(token_id))
    return Told(entries, len(waiting))


def _entry(given: Logprob, token_id: int, stream: Stream, name: Callable[[int], str | None]) -> Entry:
    def alternative(id: int, logprob: float) -> Alternative:
        data = stream.spell(id)
        text, numbers = (name(id) or "", None) if data is None else spelling(data)
        return text, numbers, logprob

    return Entry(*alternative(token_id, given.logprob), [alternative(*top) for top in given.top])


def spelling(data: bytes) -> tuple[str, list[int]]:
    """A token's text and bytes. Bytes that are no text by themselves are written as escapes."""
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data), list(data)


def likelihood(logprob: float) -> float:
    """As it is told: JSON has no infinity."""
    return logprob if math.isfinite(logprob) and logprob > UNLIKELY else UNLIKELY


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
