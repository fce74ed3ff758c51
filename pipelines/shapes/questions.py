"""What can be asked about scenes, and the one right answer to each question.

A question is asked in several ways; its answer is always worded the same, so that it can be compared exactly. Knows
scenes (`drawing`), but neither pictures nor models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.shapes.drawing import COLOURS, KINDS, Scene, Shape

HELLO = "Send me a picture of shapes and ask me about it."
ORDINALS = ("first", "second", "third", "fourth")
_COUNTS = ("no", "one", "two", "three", "four")
_GREETINGS = (
    "Hello!", "Hello", "Hi", "Hi!", "Hey", "Hi there!", "Good morning", "Who are you?", "What can you do?", "Help",
    "What are you?", "How are you?", "Say hello.", "Tell me a joke.", "What is this?", "Thanks!", "Thank you.",
    "Write a poem.", "Hello, how are you?", "Hello there!", "test", "What is the capital of France?",
)  # fmt: skip
_SYSTEMS = ("You are a helpful assistant.", "Answer in one short sentence.", "Be brief.")


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and what it is about: colour, shape, count, where, size, absent, same or hello."""

    question: str
    answer: str
    about: str


def ask(rng: random.Random, scenes: Sequence[Scene], grey: bool = False) -> Asked:
    """A question about one of the scenes, in the order they are shown; about no colour if all is `grey`."""
    if len(scenes) > 1 and not grey and rng.random() < 0.08:
        return _same_colour(rng, scenes) or ask(rng, scenes, grey)
    index = rng.randrange(len(scenes))
    asked = _about(rng, scenes[index], grey)
    if len(scenes) == 1:
        return _loosely(rng, asked)
    place = f"in the {ORDINALS[index]} picture" if rng.random() < 0.75 else f"in picture {index + 1}"
    question, mark = asked.question[:-1], asked.question[-1]
    if "in the picture" in question:
        worded = asked.question.replace("in the picture", place)
    elif rng.random() < 0.8:
        worded = f"{question} {place}{mark}"
    else:
        worded = f"{place.capitalize()}, {_lower(asked.question)}"
    return _loosely(rng, Asked(worded, asked.answer, asked.about))


def hello(rng: random.Random) -> Asked:
    """Something said without any picture."""
    return Asked(rng.choice(_GREETINGS), HELLO, "hello")


def system(rng: random.Random) -> str:
    return rng.choice(_SYSTEMS)


def where(shape: Shape) -> str:
    """The place in words: 'in the top left', 'at the top', 'on the left' or 'in the center'."""
    if shape.row == shape.column == "center":
        return "in the center"
    if shape.column == "center":
        return f"at the {shape.row}"
    if shape.row == "center":
        return f"on the {shape.column}"
    return f"in the {shape.row} {shape.column}"


def _about(rng: random.Random, scene: Scene, grey: bool) -> Asked:
    kinds: list[tuple[float, Callable[[random.Random, Scene, bool], Asked | None]]] = [
        (0 if grey else 3, _colour),
        (2, _kind),
        (2, _count),
        (1, _count_of),
        (3, _where),
        (2, _size),
        (0.5, _there),
        (0.4, _absent),
    ]
    while True:
        make = rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]
        if asked := make(rng, scene, grey):
            return asked


def _colour(rng: random.Random, scene: Scene, grey: bool) -> Asked | None:
    named = _name(rng, scene, by_colour=False)
    if named is None:
        return None
    shape, name = named
    ways = [f"What color is the {name}?", f"What colour is the {name}?",
            f"Which color is the {name}?", f"Which colour is the {name}?",
            f"What is the color of the {name}?", f"Tell me the color of the {name}."]  # fmt: skip
    if len(scene.shapes) == 1 and rng.random() < 0.2:
        return Asked(rng.choice(["What color is it?", "What colour is it?"]), f"It is {shape.colour}.", "colour")
    return Asked(rng.choice(ways), f"The {name} is {shape.colour}.", "colour")


def _kind(rng: random.Random, scene: Scene, grey: bool) -> Asked | None:
    if len(scene.shapes) == 1:
        ways = ["What shape is it?", "What shape is this?", "Which shape is it?", "What is the shape?",
                "What kind of shape is it?", "What shape is there?"]  # fmt: skip
        return Asked(rng.choice(ways), f"It is a {scene.shapes[0].kind}.", "shape")
    colours = [shape.colour for shape in scene.shapes]
    shape = rng.choice(scene.shapes)
    if grey or colours.count(shape.colour) > 1:
        return None
    ways = [f"What shape is {shape.colour}?", f"Which shape is {shape.colour}?", f"What is the {shape.colour} shape?"]
    return Asked(rng.choice(ways), f"The {shape.colour} shape is a {shape.kind}.", "shape")


def _count(rng: random.Random, scene: Scene, grey: bool) -> Asked:
    ways = ["How many shapes are there?", "How many shapes do you see?", "How many shapes are in the picture?",
            "Count the shapes.", "What is the number of shapes?"]  # fmt: skip
    return Asked(rng.choice(ways), _there_are(len(scene.shapes), "shape"), "count")


def _count_of(rng: random.Random, scene: Scene, grey: bool) -> Asked:
    if grey or rng.random() < 0.7:
        name = rng.choice(KINDS)
        number = sum(shape.kind == name for shape in scene.shapes)
    else:
        colour = rng.choice([rng.choice(scene.shapes).colour, rng.choice(COLOURS)])
        name = f"{colour} shape"
        number = sum(shape.colour == colour for shape in scene.shapes)
    ways = [f"How many {name}s are there?", f"How many {name}s do you see?", f"Count the {name}s."]
    return Asked(rng.choice(ways), _there_are(number, name), "count")


def _where(rng: random.Random, scene: Scene, grey: bool) -> Asked | None:
    named = _name(rng, scene, by_colour=not grey)
    if named is None:
        return None
    shape, name = named
    ways = [f"Where is the {name}?", f"Where is the {name}?", f"Where do you see the {name}?",
            f"What is the position of the {name}?"]  # fmt: skip
    if len(scene.shapes) == 1 and rng.random() < 0.15:
        return Asked("Where is it?", f"It is {where(shape)}.", "where")
    return Asked(rng.choice(ways), f"The {name} is {where(shape)}.", "where")


def _size(rng: random.Random, scene: Scene, grey: bool) -> Asked | None:
    named = _name(rng, scene, by_colour=not grey)
    if named is None:
        return None
    shape, name = named
    ways = [f"Is the {name} big or small?", f"Is the {name} small or big?", f"How big is the {name}?",
            f"What size is the {name}?"]  # fmt: skip
    if len(scene.shapes) == 1 and rng.random() < 0.15:
        return Asked("Is it big or small?", f"It is {shape.size}.", "size")
    return Asked(rng.choice(ways), f"The {name} is {shape.size}.", "size")


def _there(rng: random.Random, scene: Scene, grey: bool) -> Asked:
    kind = rng.choice(KINDS)
    there = any(shape.kind == kind for shape in scene.shapes)
    answer = f"Yes, there is a {kind}." if there else f"No, there is no {kind}."
    return Asked(rng.choice([f"Is there a {kind}?", f"Do you see a {kind}?"]), answer, "count")


def _absent(rng: random.Random, scene: Scene, grey: bool) -> Asked | None:
    """About a shape that is not there: the answer says so."""
    absent = [kind for kind in KINDS if all(shape.kind != kind for shape in scene.shapes)]
    if not absent:
        return None
    kind = rng.choice(absent)
    ways = [f"Where is the {kind}?", f"Is the {kind} big or small?"]
    if not grey:
        ways.append(f"What color is the {kind}?")
    return Asked(rng.choice(ways), f"There is no {kind}.", "absent")


def _same_colour(rng: random.Random, scenes: Sequence[Scene]) -> Asked | None:
    if len(scenes) != 2 or any(len(scene.shapes) != 1 for scene in scenes):
        return None
    one, other = (scene.shapes[0].colour for scene in scenes)
    question = rng.choice(["Are both shapes the same color?", "Do both shapes have the same color?"])
    return Asked(question, "Yes, both are " + one + "." if one == other else f"No, {one} and {other}.", "same")


def _name(rng: random.Random, scene: Scene, by_colour: bool) -> tuple[Shape, str] | None:
    """A shape and a name that no other shape in the scene has: 'shape', 'circle', 'red shape' or 'red circle'."""
    shape = rng.choice(scene.shapes)
    names = []
    if len(scene.shapes) == 1:
        names.append("shape")
    if [other.kind for other in scene.shapes].count(shape.kind) == 1:
        names.append(shape.kind)
    if by_colour and [other.colour for other in scene.shapes].count(shape.colour) == 1:
        names += [f"{shape.colour} shape", f"{shape.colour} {shape.kind}"]
    return (shape, rng.choice(names)) if names else None


def _there_are(number: int, name: str) -> str:
    return f"There is one {name}." if number == 1 else f"There are {_COUNTS[number]} {name}s."


def _loosely(rng: random.Random, asked: Asked) -> Asked:
    """The question as people type it: now and then in lower case, or without its mark."""
    question = asked.question
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    if rng.random() < 0.15:
        question = question.lower()
    return Asked(question, asked.answer, asked.about)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
