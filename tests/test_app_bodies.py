"""Pictures in a body, and how large it may be; a backend that plays scripts."""

import base64
import http.client
import json
import socket

import orjson
import pytest

from gateway.settings import Settings
from pipelines.pipeline import Pipeline
from tests.scripted import CHAT_PATH, COMPLETION_PATH, MODEL, PROMPT, ScriptedBackend, Server

# Pictures.


RED = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WHAT = {"type": "text", "text": "What is it?"}
# A JPEG as far as its first scan, whose pixels follow: 8 bits, 16 x 16, grey.
HEADED = bytes.fromhex("ffd8 ffc0 000b 08 0010 0010 01 01 11 00 ffda 0008 01 01 00 00 3f 00")


def seeing(*parts, model="seeing", **more):
    return {"model": model, "messages": [{"role": "user", "content": [*parts]}], **more}


def picture(size):
    return {"type": "image_url", "image_url": {"url": "x" * size}}


@pytest.fixture
def sighted(sighted_server):
    sighted_server.backend.reset()
    return sighted_server


@pytest.fixture(scope="module")
def sighted_server():
    backend = ScriptedBackend()
    backend.served["seeing"] = Pipeline(name="seeing", source="path:none", max_images=2)
    with Server(backend, Settings()) as server:
        yield server


def test_image_parts_go_on_as_they_came(sighted):
    response = sighted.post(CHAT_PATH, seeing(WHAT, RED, {**RED, "image_url": {"url": "https://h/x", "detail": "low"}}))
    assert response.status_code == 200
    (submission,) = sighted.backend.submissions
    (message,) = json.loads(submission.inputs["messages"])
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "image_url"]
    assert [part["image_url"]["url"] for part in message["content"][1:]] == [RED["image_url"]["url"], "https://h/x"]
    assert [part["image_url"]["detail"] for part in message["content"][1:]] == ["auto", "low"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (seeing(WHAT, RED, model=MODEL), "messages[0].content[1].type"),
        (seeing(RED, RED, WHAT, RED), "messages[0].content[3].type"),
        (seeing(WHAT, {"type": "image_url", "image_url": {"url": "data:,", "detail": "best"}}), None),
    ],
)
def test_images_that_the_pipeline_does_not_take_are_refused_by_path(sighted, body, param):
    response = sighted.post(CHAT_PATH, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == (param or "messages[0].content[1].image_url.detail")
    assert sighted.backend.submissions == []


def test_a_large_picture_without_its_end_goes_nowhere(sighted):
    url = "data:image/jpeg;base64," + base64.b64encode(HEADED + bytes(1_000_000)).decode()
    response = sighted.post(CHAT_PATH, seeing(WHAT, {"type": "image_url", "image_url": {"url": url}}))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_image")
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert "cut off before its end" in error["message"]
    assert sighted.backend.submissions == []


def test_pictures_have_room_beside_the_body(sighted):
    """What is no picture is bounded as it is without pictures: a text of megabytes would hold the tokenizer."""
    settings = Settings()
    body = seeing(picture(settings.max_image_bytes), WHAT)
    assert sighted.post(CHAT_PATH, body).status_code == 200
    text = {"type": "text", "text": "x" * settings.max_body_bytes}
    for refused in (seeing(RED, text), seeing(text), seeing(text, model=MODEL)):
        response = sighted.post(CHAT_PATH, refused)
        assert response.status_code == 413
        assert "without its pictures" in response.json()["error"]["message"]
    response = sighted.post(CHAT_PATH, seeing(picture(settings.max_image_bytes + settings.max_body_bytes)))
    assert response.status_code == 413
    assert "without" not in response.json()["error"]["message"]


def test_large_bodies_are_as_deep_as_small_ones(sighted):
    deep = b"[" * 200 + b"]" * 200
    large = b'{"model": "seeing", "x": %s, "messages": "%s"}' % (deep, b"x" * 2_000_000)
    response = sighted.post(CHAT_PATH, large)
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]


# The body's limit.


def test_the_limit_is_exact(server):
    def body(size):
        empty = len(orjson.dumps({**PROMPT, "prompt": ""}))
        return orjson.dumps({**PROMPT, "prompt": "x" * (size - empty)})

    limit = Settings().max_body_bytes
    assert server.post(COMPLETION_PATH, body(limit)).status_code == 200
    response = server.post(COMPLETION_PATH, body(limit + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["x-request-id"]


def test_an_announced_body_is_refused_unread(server):
    headers = "host: test\r\ncontent-length: 99999999999\r\nexpect: 100-continue"
    head = f"POST {CHAT_PATH} HTTP/1.1\r\n{headers}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_refused_while_it_is_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("POST", CHAT_PATH, body=(b"x" * 65536 for _ in range(40)), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()
