"""Pictures on their way into a prompt: their order, their room, what is asked of whom, and what an error names."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines import contracts
from pipelines.engine.query import check_sampling
from pipelines.errors import StageError
from pipelines.images.features import Features, unpack
from pipelines.images.fetch import Fetching
from pipelines.images.gate import Gate
from pipelines.images.raw import RawProcessor, question
from pipelines.images.reading import Reader, Source
from pipelines.images.vision import Vision
from pipelines.preprocess import Preprocess
from pipelines.spelling import Spelling
from pipelines.template import ChatTemplate
from tests import stand_in
from tests.product import wait_for

TEMPLATE = """{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}{% for part in m.content
%}{% if part.type == 'image' %}<i> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"""
RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def encoded(color: tuple[int, int, int], size: tuple[int, int] = (4, 3), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def part(data: bytes, detail: str | None = None, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


class Eye:
    """A processor that sees a picture's first pixel and its size, and can be made to wait."""

    image_token = "<i>"
    reserved = ("<i>",)

    def __init__(self) -> None:
        self.seen: list[tuple[Any, tuple[int, int]]] = []
        self.open = threading.Event()
        self.open.set()

    def run(self, rendered: str, pictures: list[Image.Image], *, param: str) -> tuple[list[int], Features | None]:
        self.seen += [(picture.getpixel((0, 0)), picture.size) for picture in pictures]
        assert self.open.wait(30)
        ids = [1 if word == "<i>" else 2 for word in rendered.split()]
        if not pictures:
            return ids, None
        pixels = np.stack([np.array(picture.getpixel((0, 0)), dtype=np.uint8) for picture in pictures])
        return ids, Features({"pixel_values": pixels}, [-id if id == 1 else id for id in ids])


class Spans:
    """What was timed, and what was noted of it."""

    def __init__(self) -> None:
        self.noted: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> Any:
        spans, noted = self, self.noted.setdefault(name, {})

        class Span:
            def set(self, attributes: dict[str, Any]) -> None:
                noted.update({key: value for key, value in attributes.items() if value is not None})

            def __enter__(self) -> Span:
                return self

            def __exit__(self, *error: object) -> None:
                spans.noted[name]["ended"] = True

        return Span()


def preprocess(
    eye: Eye | None = None, *, gate: Gate | None = None, max_images: int = 3, least: int | None = None
) -> Preprocess:
    reader = Reader(max_pixels=10_000, gate=gate or Gate(1 << 20), fetching=Fetching(on=False), least=least)
    tokenizer = Tokenizer(models.WordLevel({"<i>": 1, "a": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vision = Vision(reader, eye or Eye(), max_images)  # type: ignore[arg-type]
    return Preprocess(tokenizer, ChatTemplate(TEMPLATE), 64, vision)


def chat(*content: dict[str, Any]) -> str:
    return json.dumps([{"role": "user", "content": list(content)}])


def test_pictures_come_in_the_order_of_the_prompt() -> None:
    eye, spans = Eye(), Spans()
    stage = preprocess(eye)
    messages = json.dumps(
        [
            {"role": "user", "content": [part(encoded(RED, (5, 4))), text("a"), part(encoded(GREEN))]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": [text("a"), part(encoded(BLUE))]},
        ]
    )
    prepared = stage.run(messages=messages, stage=spans)
    assert eye.seen == [(RED, (5, 4)), (GREEN, (4, 3)), (BLUE, (4, 3))]
    assert prepared.pictures == [(5, 4), (4, 3), (4, 3)]
    assert prepared.input_ids == [1, 2, 1, 2, 2, 1]
    outputs = stage.outputs(prepared)
    features = unpack(outputs[contracts.FEATURES])
    assert features.arrays["pixel_values"].tolist() == [list(RED), list(GREEN), list(BLUE)]
    assert features.identity == [-1, 2, -1, 2, 2, -1]
    assert json.loads(outputs[contracts.PICTURES]) == [[5, 4], [4, 3], [4, 3]]
    assert list(spans.noted) == ["render", "image.fetch", "image.decode", "tokenize"]
    assert spans.noted["image.fetch"]["triptych.image.count"] == 3
    assert spans.noted["image.fetch"]["triptych.image.bytes"] == sum(
        len(encoded(color, size)) for color, size in ((RED, (5, 4)), (GREEN, (4, 3)), (BLUE, (4, 3)))
    )
    assert spans.noted["image.decode"]["triptych.image.widths"] == [5, 4, 4]
    assert spans.noted["image.decode"]["triptych.image.formats"] == ["PNG"] * 3
    assert spans.noted["tokenize"]["triptych.features.bytes"] == 9
    assert all(noted["ended"] for noted in spans.noted.values())


def test_an_image_is_before_the_words_of_its_prompt() -> None:
    eye = Eye()
    prepared = preprocess(eye).run(prompt="a a", image=encoded(RED))
    assert (eye.seen, prepared.input_ids, prepared.pictures) == ([(RED, (4, 3))], [1, 2, 2], [(4, 3)])


def test_a_chat_without_pictures_says_so() -> None:
    stage, spans = preprocess(), Spans()
    outputs = stage.outputs(stage.run(prompt="a", stage=spans))
    assert len(outputs[contracts.FEATURES]) == 0
    assert outputs[contracts.PICTURES] == b"[]"
    assert list(spans.noted) == ["render", "tokenize"]


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        (
            {"messages": chat(text("a")), "image": b"x"},
            "image",
            "not with 'messages': there an image is an 'image_url'",
        ),
        ({"text": "a", "image": b"x"}, "image", "not with 'text'"),
        ({"prompt": "a", "image": b""}, "image", "'image'"),
        ({"prompt": "a", "image": b"<svg></svg>"}, "image", "SVG"),
        ({"messages": chat(*[part(encoded(RED))] * 4)}, "messages[0].content[3].type", "At most 3"),
        ({"messages": chat(text("a"), part(encoded(RED)[:45]))}, "messages[0].content[1].image_url.url", "cut off"),
        ({"messages": chat(part(encoded(RED, (200, 51))))}, "messages[0].content[0].image_url.url", "200 x 51 pixels"),
        (
            {"messages": chat({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})},
            "messages[0].content[0].image_url.url",
            "",
        ),
    ],
)
def test_a_refusal_names_its_part(given: dict[str, Any], param: str, says: str) -> None:
    eye, gate = Eye(), Gate(1 << 20)
    with pytest.raises(StageError) as error:
        preprocess(eye, gate=gate).run(**given)
    assert (error.value.param, eye.seen, gate.held) == (param, [], 0)
    assert says in error.value.message


def test_nothing_is_decoded_if_one_of_them_cannot_be() -> None:
    eye, spans = Eye(), Spans()
    with pytest.raises(StageError) as error:
        preprocess(eye).run(messages=chat(part(encoded(RED)), part(encoded(RED, (200, 51)))), stage=spans)
    assert list(spans.noted) == ["render", "image.fetch"]
    assert error.value.param == "messages[0].content[1].image_url.url"


def test_a_pipeline_without_eyes_refuses() -> None:
    stage = Preprocess(preprocess().tokenizer, ChatTemplate(TEMPLATE), 64)
    with pytest.raises(StageError, match="'image' is not supported by this pipeline: it reads text only"):
        stage.run(prompt="a", image=encoded(RED))
    with pytest.raises(StageError, match="takes text only") as error:
        stage.run(messages=chat(text("a"), part(encoded(RED))))
    assert error.value.param == "messages[0].content[1].type"
    assert set(stage.outputs(stage.run(prompt="a"))) == {contracts.INPUT_IDS, contracts.SAMPLING}


def test_a_model_that_is_asked_in_text_gets_the_question_and_the_pixels() -> None:
    spelling = Spelling(stand_in.tokenizer())
    reader = Reader(max_pixels=10_000, gate=Gate(1 << 20), fetching=Fetching(on=False))
    stage = Preprocess(
        stand_in.tokenizer(), None, 64, Vision(reader, RawProcessor(spelling), 1, question, check_sampling)
    )
    prepared = stage.run(prompt="what colour is it?", image=encoded(RED))
    assert spelling.text(prepared.input_ids) == "what colour is it?"
    assert prepared.features is not None
    assert prepared.features.arrays["picture"].tolist() == [[list(RED)] * 4] * 3
    assert prepared.pictures == [(4, 3)]
    offer = json.dumps({"tools": [{"type": "function", "function": {"name": "f"}}]})
    for given, param in (({"tools": offer}, "tools"), ({"sampling": '{"top_k": 3}'}, "top_k")):
        with pytest.raises(StageError) as error:
            stage.run(prompt="what?", **given)
        assert error.value.param == param


def test_low_detail_is_a_small_picture_of_the_same_shape() -> None:
    eye = Eye()
    stage = preprocess(eye)
    data = encoded(RED, (1000, 10))
    assert stage.run(messages=chat(part(data, "low"), part(data, "high"))).pictures == [(1000, 10)] * 2
    assert [size for _, size in eye.seen] == [(512, 5), (1000, 10)]


def test_a_jpeg_is_decoded_no_larger_than_it_needs_to_be() -> None:
    eye = Eye()
    data = encoded(RED, (96, 64), "JPEG")
    prepared = preprocess(eye, least=16).run(messages=chat(part(data, kind="jpeg")))
    assert (prepared.pictures, [size for _, size in eye.seen]) == ([(96, 64)], [(24, 16)])


def test_a_burst_waits_for_room() -> None:
    """By the gate's own count: what is decoded at a time, and that the room is for all of a request's pictures."""
    eye = Eye()
    data = encoded(RED, (50, 40))
    reader = Reader(max_pixels=10_000, gate=Gate(1), fetching=Fetching(on=False))
    with reader.admitted([Source("image", data)], Spans()) as admitted:
        each = admitted.bytes_needed
    gate = Gate(2 * each)
    stage = preprocess(eye, gate=gate)
    eye.open.clear()
    errors: list[BaseException] = []

    def ask(count: int) -> None:
        try:
            stage.run(messages=chat(*[part(data)] * count))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(count,)) for count in (1, 1, 2, 1, 3, 1)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_for(lambda number=number: min(number, 2) * each == gate.held and gate.waiting == max(0, number - 2), 20)
    assert len(eye.seen) <= 2
    eye.open.set()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert len(eye.seen) == 9
    assert (gate.held, gate.waiting) == (0, 0)
