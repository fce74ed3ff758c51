"""A pool of training pictures, drawn once, spoilt as pictures get on their way, and kept at the model's own size.

Drawing takes longer than learning from the result, so a picture is used many times, half of them mirrored. Knows
pixels and scenes; neither words nor models.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from pipelines.shapes.drawing import COLOURS, COLUMNS, KINDS, ROWS, SIZES, Scene, draw, random_scene

_CHUNK = 500  # pictures of one seed: what the pool holds depends on no number of processes
Numbers = np.ndarray[Any, np.dtype[Any]]
# How many answers each has: is a centre here; colour, kind, size, column and row of the shape here; how many in all.
LANDMARKS = (2, len(COLOURS), len(KINDS), len(SIZES), len(COLUMNS), len(ROWS), 4)
IGNORE = -100  # torch's label of what is not learned


@dataclass(frozen=True)
class Pool:
    """Pictures [n, side, side, 3], and of each its scene and whether it has lost its colours."""

    pictures: Numbers
    scenes: list[Scene]
    grey: Numbers

    def __len__(self) -> int:
        return len(self.scenes)

    def get(self, index: int, mirrored: bool) -> tuple[Numbers, Scene]:
        if mirrored:
            return self.pictures[index, :, ::-1], self.scenes[index].mirrored()
        return self.pictures[index], self.scenes[index]


def fill(count: int, side: int, seed: int) -> Pool:
    """`count` pictures at `side` x `side` pixels; the same for the same seed."""
    chunks = [(seed * 1_000_003 + number, side) for number in range(math.ceil(count / _CHUNK))]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        parts = list(workers.map(_chunk, chunks))
    pictures = np.concatenate([part.pictures for part in parts])
    grey = np.concatenate([part.grey for part in parts])
    return Pool(pictures[:count], [scene for part in parts for scene in part.scenes][:count], grey[:count])


def landmarks(scene: Scene, cells: int) -> Numbers:
    """What is where, by cell of a grid, [len(LANDMARKS), cells * cells].

    All but whether a shape's centre is there are IGNORE in cells whose middle lies in no shape.
    """
    found = np.full((len(LANDMARKS), cells, cells), IGNORE, np.int64)
    found[0] = 0
    middles = (np.arange(cells) + 0.5) / cells
    root = math.sqrt(scene.width * scene.height)
    for shape in scene.shapes:
        across = (middles[None] - shape.x) * scene.width / root
        down = (middles[:, None] - shape.y) * scene.height / root
        inside = np.hypot(across, down) < shape.span / 2
        row, column = int(shape.y * cells), int(shape.x * cells)
        inside[row, column] = True
        found[0, row, column] = 1
        attributes = (
            COLOURS.index(shape.colour),
            KINDS.index(shape.kind),
            SIZES.index(shape.size),
            COLUMNS.index(shape.column),
            ROWS.index(shape.row),
            len(scene.shapes) - 1,
        )
        for number, value in enumerate(attributes, start=1):
            found[number][inside] = value
    return found.reshape(len(LANDMARKS), -1)


def _chunk(job: tuple[int, int]) -> Pool:
    seed, side = job
    rng = random.Random(seed)
    scenes, pictures, grey = [], [], []
    for _ in range(_CHUNK):
        scene = _random_size_scene(rng)
        colourless = rng.random() < 0.06
        picture = _spoil(rng, draw(scene).convert("L").convert("RGB") if colourless else draw(scene))
        pictures.append(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)))
        scenes.append(scene)
        grey.append(colourless)
    return Pool(np.stack(pictures), scenes, np.array(grey))


def _random_size_scene(rng: random.Random) -> Scene:
    root, stretch = rng.uniform(84, 210), 2 ** rng.uniform(-0.55, 0.55)
    return random_scene(rng, round(root * stretch), round(root / stretch))


def _spoil(rng: random.Random, picture: Image.Image) -> Image.Image:
    """The picture as it may arrive: compressed, blurred, or with few colours."""
    if rng.random() < 0.1:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.08:
        return picture.quantize(rng.choice((16, 64, 256))).convert("RGB")
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(50, 95))
        return Image.open(file).convert("RGB")
    return picture


def singles(pool: Pool) -> dict[str, Sequence[int]]:
    """The pictures of one shape in colour, by its colour."""
    found: dict[str, list[int]] = {colour: [] for colour in COLOURS}
    for index, scene in enumerate(pool.scenes):
        if len(scene.shapes) == 1 and not pool.grey[index]:
            found[scene.shapes[0].colour].append(index)
    return dict(found)
