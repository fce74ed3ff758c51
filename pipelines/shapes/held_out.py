"""Pictures and questions that the model has not seen, encoded as people send pictures.

No picture here is of a size that the model was trained on, few are of such a format, and no seed is one of training's.
Knows scenes and questions; nothing of models, and nothing of how an encoded picture is decoded.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

from pipelines.shapes.drawing import Scene, draw, random_scene
from pipelines.shapes.questions import Asked, ask

# What a camera that was held like that stores: the picture as a person sees it, turned back by what its tag says.
_STORED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
_SIZES = {
    "jpeg": ((640, 480), (480, 640)),
    "turned": ((640, 480), (480, 640), (600, 400)),
    "transparent": ((512, 512), (500, 300), (256, 400)),
    "palette": ((320, 240), (400, 400)),
    "webp": ((768, 512), (600, 600)),
    "wide": ((900, 450), (450, 900), (1000, 520)),
    "odd": ((333, 517), (701, 433), (97, 71), (1201, 800), (64, 64)),
    "grey": ((640, 480), (300, 300)),
}
FORMS = (*_SIZES, "pair")
_OF_EACH = {
    "jpeg": 6,
    "turned": 4,
    "transparent": 3,
    "palette": 2,
    "webp": 2,
    "wide": 3,
    "odd": 3,
    "grey": 1,
    "pair": 5,
}


@dataclass(frozen=True)
class Case:
    """Encoded pictures, whether the question comes before them, the question, its answer, and of what form it is.

    `apart`: several shapes, or pictures, must be told apart to answer.
    """

    pictures: tuple[bytes, ...]
    asked: Asked
    form: str
    question_first: bool
    apart: bool = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As transformers' chat templates of vision models take them."""
        text = [{"type": "text", "text": self.asked.question}]
        shown = [{"type": "image"} for _ in self.pictures]
        return [{"role": "user", "content": text + shown if self.question_first else shown + text}]


def cases(count: int = 500, seed: int = 987_654_321) -> list[Case]:
    """`count` cases, always the same ones."""
    rng = random.Random(seed)
    forms = rng.choices(list(_OF_EACH), list(_OF_EACH.values()), k=count)
    return [_case(rng, form) for form in forms]


def _case(rng: random.Random, form: str) -> Case:
    first = rng.random() < 0.5
    if form == "pair":
        forms = rng.choices(("jpeg", "transparent", "palette", "webp", "odd"), k=2)
        scenes = [_scene(rng, one) for one in forms]
        files = tuple(_encode(rng, one, scene) for one, scene in zip(forms, scenes, strict=True))
        return Case(files, ask(rng, scenes), form, first, apart=True)
    while True:
        scene = _scene(rng, form)
        asked = ask(rng, [scene], grey=form == "grey")
        # In the center of a picture turned by mistake is still the center.
        if form != "turned" or (asked.about == "where" and "center" not in asked.answer):
            return Case((_encode(rng, form, scene),), asked, form, first, apart=len(scene.shapes) > 1)


def _scene(rng: random.Random, form: str) -> Scene:
    return random_scene(rng, *rng.choice(_SIZES[form]))


def _encode(rng: random.Random, form: str, scene: Scene) -> bytes:
    if form == "transparent":
        return _file(draw(scene, transparent=True), "PNG")
    picture = draw(scene)
    quality = rng.randint(75, 90)
    if form == "turned":
        orientation, stored = rng.choice(list(_STORED.items()))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        return _file(picture.transpose(stored), "JPEG", quality=quality, exif=exif)
    if form == "grey":
        return _file(picture.convert("L"), "JPEG", quality=quality)
    if form == "palette":
        return _file(picture.quantize(256), "GIF")
    if form == "webp":
        return _file(picture, "WEBP", quality=quality)
    if form == "odd":
        return _file(picture, "PNG")
    return _file(picture, "JPEG", quality=quality)


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
