"""What the clients of a soak ask for, and what they must be told: drawn from a seed. Pure.

An echo repeats its prompt's tokens, so its answer is known before it is asked. Knows tokenizers and the gateway's
parameters; sends nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipelines.preprocess import Preprocess

INTERACTIVE, BATCH = 0, 10  # `priority`: of the requests that wait for the engine the lowest is first
TIMEOUT_HEADER = "x-request-timeout-ms"
_WORDS = ("stone", "river", "seven", "Ωmega", "naïve", "🙂", "to", "be", "of", "light", "x=1;", "\n", "日本", "tail")
_DEADLINE_S = 30.0
_HURRIED_S = (0.3, 0.8)


@dataclass(frozen=True)
class Ask:
    """One request. `text` is all that it may be told, None where that is only known from asking.

    `hurried`: its deadline is too short for its answer, so a timeout is what is right.
    """

    pipeline: str
    path: str
    body: Mapping[str, Any]
    deadline_s: float
    text: str | None
    tokens: int
    hurried: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return {TIMEOUT_HEADER: str(round(self.deadline_s * 1000))}

    @property
    def stream(self) -> bool:
        return bool(self.body["stream"])


class Echoed:
    """What an echo pipeline answers: its prompt's tokens over and over, as text without what is special."""

    def __init__(self, home: Path) -> None:
        self._preprocess = Preprocess.load(home, context=1 << 20)

    def completion(self, prompt: str, tokens: int) -> str:
        return self._text(self._preprocess.run(text=prompt).input_ids, tokens)

    def chat(self, messages: str, tokens: int) -> str:
        return self._text(self._preprocess.run(messages=messages).input_ids, tokens)

    def _text(self, ids: Sequence[int], tokens: int) -> str:
        return self._preprocess.tokenizer.decode(list(islice(cycle(ids), tokens)), skip_special_tokens=True)


@dataclass(frozen=True)
class Echo:
    """A pipeline to ask. `pace` is tokens a second, 0 as fast as it goes."""

    name: str
    pace: float


def draw(
    dice: random.Random,
    echoes: Sequence[Echo],
    completion: Callable[[str, int], str],
    chat: Callable[[str, int], str],
    to_json: Callable[[Any], str],
) -> Ask:
    """The next request of one client: streamed or whole, short or long, chat or completion, hurried now and then."""
    echo = dice.choice(echoes)
    long, hurried = dice.random() < 0.2, bool(echo.pace) and dice.random() < 0.1
    tokens = dice.randint(100, 400) if long else dice.randint(1, 32)
    deadline_s = _DEADLINE_S
    if hurried:
        deadline_s = dice.uniform(*_HURRIED_S)
        tokens = int(echo.pace * deadline_s * 4)
    prompt = " ".join(dice.choices(_WORDS, k=dice.randint(1, 60)))
    stream = dice.random() < 0.65
    body: dict[str, Any] = {"model": echo.name, "max_tokens": tokens, "stream": stream}
    if dice.random() < 0.3:
        body["priority"] = BATCH
    if stream:
        body["stream_options"] = {"include_usage": True}
    if dice.random() < 0.4:
        body["messages"] = [{"role": "user", "content": prompt}]
        text = chat(to_json(body["messages"]), tokens)
        return Ask(echo.name, "/chat/completions", body, deadline_s, text, tokens, hurried)
    body["prompt"] = prompt
    return Ask(echo.name, "/completions", body, deadline_s, completion(prompt, tokens), tokens, hurried)
