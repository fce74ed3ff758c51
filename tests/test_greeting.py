"""What a user is told to try is what can be tried."""

import base64
import io
import json
import shlex

from PIL import Image

from gateway.greeting import greeting
from pipelines.messages import image_parts, parse_messages
from pipelines.pipeline import Pipeline

URL = "http://127.0.0.1:8080"
TEXT, SEEING = (
    Pipeline(name=name, source="path:x", max_images=images) for name, images in (("text", 0), ("seeing", 2))
)


def bodies(*pipelines):
    commands = [line for line in greeting(URL, pipelines).splitlines() if line.startswith("curl ")]
    words = [shlex.split(command) for command in commands]
    assert all(word[1] == f"{URL}/v1/chat/completions" for word in words)
    return [json.loads(word[-1]) for word in words]


def test_each_kind_of_pipeline_has_a_command():
    assert [body["model"] for body in bodies(SEEING, TEXT)] == ["text", "seeing"]
    assert [body["model"] for body in bodies(SEEING)] == ["seeing"]
    assert [body["model"] for body in bodies(TEXT, TEXT)] == ["text"]


def test_a_gateway_with_keys_says_where_one_goes():
    (command,) = [line for line in greeting(URL, [TEXT], keyed=True).splitlines() if line.startswith("curl ")]
    words = shlex.split(command)
    assert words[words.index("-H") + 1] == "authorization: Bearer $KEY"
    assert 'Bearer $KEY"' in command  # in quotes in which a shell puts the key


def test_the_picture_is_a_red_square_on_white():
    (body,) = bodies(SEEING)
    (part,) = image_parts(parse_messages(body["messages"]))
    with Image.open(io.BytesIO(base64.b64decode(part.url.partition(",")[2]))) as image:
        seen = image.convert("RGB")
    assert seen.size == (64, 64)
    assert [seen.getpixel(at) for at in ((0, 0), (16, 16), (47, 47), (48, 48), (32, 15))] == [
        (255, 255, 255),
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
        (255, 255, 255),
    ]
