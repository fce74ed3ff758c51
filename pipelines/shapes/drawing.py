"""A random scene of shapes, and the picture of it. The scene is the truth, the picture is what a model gets to see.

Every fact in a scene is one that a person sees without a ruler: colours, sizes and places keep clear of the borders
between two answers. Knows neither questions nor models. The same seed gives the same scene and the same picture.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "black", "purple", "orange")
SIZES = ("small", "big")
COLUMNS = ("left", "center", "right")
ROWS = ("top", "center", "bottom")

RGB = tuple[int, int, int]
_CORNERS = {
    "square": ((-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)),
    "triangle": ((0.0, -0.52), (0.55, 0.46), (-0.55, 0.46)),
}
_SMOOTH = 3  # a picture is drawn this much larger, then reduced: that is what makes its edges smooth
# Hue, saturation and value, each from … to … A hue may be below 0: red lies on both sides of it.
_HSV = {
    "red": ((-0.02, 0.015), (0.78, 1.0), (0.75, 1.0)),
    "orange": ((0.073, 0.095), (0.85, 1.0), (0.93, 1.0)),
    "yellow": ((0.142, 0.16), (0.8, 1.0), (0.9, 1.0)),
    "green": ((0.3, 0.4), (0.65, 1.0), (0.45, 0.75)),
    "blue": ((0.58, 0.65), (0.7, 1.0), (0.65, 1.0)),
    "purple": ((0.76, 0.81), (0.6, 0.95), (0.45, 0.75)),
    "black": ((0.0, 1.0), (0.0, 0.3), (0.0, 0.12)),
}
# A side as a share of the root of the picture's area: of a picture twice as wide as high, too.
_SPAN = {"small": (0.14, 0.19), "big": (0.31, 0.38)}
_BANDS = ((0.0, 0.3), (0.44, 0.56), (0.7, 1.0))  # where centres may lie, along either axis
_EDGE = 0.015  # least distance from the picture's edge, in shares of its shorter side
_GAP = 0.03  # least distance between two shapes, likewise of the root of the area


@dataclass(frozen=True)
class Shape:
    """One shape. `x`, `y` (its centre) and `span` (its side) are shares of the picture's width, height and √area."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    span: float
    rgb: RGB
    turn: float = 0.0  # degrees

    @property
    def column(self) -> str:
        return COLUMNS[_band(self.x)]

    @property
    def row(self) -> str:
        return ROWS[_band(self.y)]


@dataclass(frozen=True)
class Background:
    """A colour at the top left, one at the bottom right, a smooth change between them, and noise (in grey levels)."""

    start: RGB = (255, 255, 255)
    end: RGB = (255, 255, 255)
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """What is in a picture of `width` x `height` pixels."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    background: Background = Background()

    def mirrored(self) -> Scene:
        """The scene of the picture mirrored left to right."""
        shapes = tuple(replace(shape, x=1 - shape.x, turn=-shape.turn) for shape in self.shapes)
        return replace(self, shapes=shapes)


def random_scene(rng: random.Random, width: int, height: int, count: int | None = None) -> Scene:
    """A scene with `count` shapes, or one to four, none touching another."""
    wanted = count or rng.choices((1, 2, 3, 4), (0.46, 0.22, 0.16, 0.16))[0]
    while True:
        shapes: list[Shape] = []
        for _ in range(40 * wanted):
            shape = _random_shape(rng, width, height, small=0.35 + 0.12 * wanted)
            if shape and all(_apart(shape, other, width, height) for other in shapes):
                shapes.append(shape)
            if len(shapes) == wanted:
                return Scene(width, height, tuple(shapes), _random_background(rng))


def draw(scene: Scene, *, transparent: bool = False) -> Image.Image:
    """The picture: RGB, or, for `transparent`, RGBA with nothing behind the shapes."""
    picture = Image.new("RGBA", (scene.width, scene.height)) if transparent else _paper(scene)
    for shape in scene.shapes:
        left, top, mask = _stencil(shape, scene.width, scene.height)
        if transparent:
            layer = Image.new("RGBA", mask.size, (*shape.rgb, 255))
            layer.putalpha(mask)
            picture.alpha_composite(layer, (left, top))
        else:
            picture.paste(shape.rgb, (left, top), mask)
    return picture


def _stencil(shape: Shape, width: int, height: int) -> tuple[int, int, Image.Image]:
    """Where in the picture a mask of the shape belongs, and the mask: smooth, and no larger than it must be."""
    x, y, side = shape.x * width, shape.y * height, shape.span * math.sqrt(width * height)
    reach = 0.75 * side + 1
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    across, down = min(width, int(x + reach) + 1) - left, min(height, int(y + reach) + 1) - top
    mask = Image.new("L", (across * _SMOOTH, down * _SMOOTH))
    pen = ImageDraw.Draw(mask)
    x, y, side = (x - left) * _SMOOTH, (y - top) * _SMOOTH, side * _SMOOTH
    if shape.kind == "circle":
        pen.ellipse((x - side / 2, y - side / 2, x + side / 2, y + side / 2), fill=255)
    else:
        cos, sin = math.cos(math.radians(shape.turn)), math.sin(math.radians(shape.turn))
        corners = _CORNERS[shape.kind]
        pen.polygon([(x + side * (a * cos - b * sin), y + side * (a * sin + b * cos)) for a, b in corners], fill=255)
    return left, top, mask.resize((across, down), Image.Resampling.BOX)


def _paper(scene: Scene) -> Image.Image:
    paper = scene.background
    if paper.start == paper.end and not paper.noise:
        return Image.new("RGB", (scene.width, scene.height), paper.start)
    along = np.linspace(0, 1, scene.width)[None, :, None] / 2 + np.linspace(0, 1, scene.height)[:, None, None] / 2
    levels = np.asarray(paper.start) * (1 - along) + np.asarray(paper.end) * along
    if paper.noise:
        levels = levels + np.random.default_rng(paper.seed).normal(0, paper.noise, levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _random_shape(rng: random.Random, width: int, height: int, small: float) -> Shape | None:
    """A shape somewhere, or None if what was drawn does not fit there."""
    size = "small" if rng.random() < small else "big"
    span = rng.uniform(*_SPAN[size])
    root = math.sqrt(width * height)
    margin = 0.55 * span * root + _EDGE * min(width, height)
    x = _place(rng, margin / width)
    y = _place(rng, margin / height)
    if x is None or y is None:
        return None
    colour = rng.choice(COLOURS)
    turn = rng.uniform(-12, 12)
    return Shape(rng.choice(KINDS), colour, size, x, y, span, _random_rgb(rng, colour), turn)


def _place(rng: random.Random, margin: float) -> float | None:
    low, high = rng.choice(_BANDS)
    low, high = max(low, margin), min(high, 1 - margin)
    return rng.uniform(low, high) if low <= high else None


def _apart(one: Shape, other: Shape, width: int, height: int) -> bool:
    root = math.sqrt(width * height)
    distance = math.hypot((one.x - other.x) * width / root, (one.y - other.y) * height / root)
    return distance >= 0.62 * (one.span + other.span) + _GAP


def _random_rgb(rng: random.Random, colour: str) -> RGB:
    hue, saturation, value = (rng.uniform(*limits) for limits in _HSV[colour])
    return _levels(hue % 1, saturation, value)


def _random_background(rng: random.Random) -> Background:
    """White for a third, else a light tint or a change from one tint to another, with or without a little noise."""
    if rng.random() < 0.33:
        return Background()
    start = _levels(rng.random(), rng.uniform(0, 0.12), rng.uniform(0.86, 1))
    end = _levels(rng.random(), rng.uniform(0, 0.12), rng.uniform(0.86, 1)) if rng.random() < 0.5 else start
    return Background(start, end, rng.choice((0.0, 0.0, 3.0, 7.0)), rng.randrange(2**32))


def _levels(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = (round(255 * level) for level in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _band(share: float) -> int:
    return 0 if share < 0.37 else 1 if share < 0.63 else 2
