"""Conversations to learn from: pictures and questions in the order and the places where people put them.

Writes messages as transformers' chat templates of vision models take them. Knows scenes and questions; neither pixels
nor tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pipelines.shapes.drawing import Scene, random_scene
from pipelines.shapes.questions import HELLO, Asked, ask, hello, system

Message = dict[str, Any]


def conversation(
    rng: random.Random, scenes: Sequence[Scene], turns: int, grey: bool = False, plain: bool = False
) -> list[Message]:
    """`turns` questions with their answers. The pictures come with the first, mostly; some come with a later one.

    `plain`: they all come with the first, and nothing else is said.
    """
    messages: list[Message] = []
    if plain:
        messages += _turn(rng, ask(rng, scenes, grey), len(scenes))
        for _ in range(turns - 1):
            messages += _turn(rng, ask(rng, scenes, grey), 0)
        return messages
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": system(rng)})
    if rng.random() < 0.08:
        messages += _turn(rng, hello(rng), 0)
    if not scenes:
        for _ in range(turns):
            messages += _turn(rng, _blind(rng), 0)
        return messages
    seen = len(scenes) if len(scenes) == 1 or rng.random() < 0.75 else len(scenes) - 1
    messages += _turn(rng, ask(rng, scenes[:seen], grey), seen)
    late = rng.randrange(1, turns) if seen < len(scenes) and turns > 1 else 0
    for number in range(1, turns):
        if number == late:  # one more picture, and the question is about that one, or says about which
            about = scenes[seen:] if rng.random() < 0.5 else scenes
            messages += _turn(rng, ask(rng, about, grey), len(scenes) - seen)
            seen = len(scenes)
        else:
            messages += _turn(rng, ask(rng, scenes[:seen], grey), 0)
    return messages


def _blind(rng: random.Random) -> Asked:
    """A question about a picture that nobody sent."""
    if rng.random() < 0.5:
        return hello(rng)
    return Asked(ask(rng, [random_scene(rng, 100, 100)]).question, HELLO, "hello")


def _turn(rng: random.Random, asked: Asked, pictures: int) -> list[Message]:
    text: list[Message] = [{"type": "text", "text": asked.question}]
    shown: list[Message] = [{"type": "image"} for _ in range(pictures)]
    parts = shown + text if rng.random() < 0.5 else text + shown
    answer = [{"type": "text", "text": asked.answer}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
