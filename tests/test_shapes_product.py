"""`shapes-vlm` served by the real Triton: whichever way a picture comes in, what is said of it is what the model says.

The truth is transformers' own processor and `generate` in this process, and beyond that what was drawn.
"""

from __future__ import annotations

import base64
import json
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc

from pipelines.pipeline import CATALOG, load_pipeline
from pipelines.shapes.held_out import Case, cases
from pipelines.shapes.score import Answers, decode
from tests.orchestrator_call import OrchestratorCall
from tests.product import Product, bytes_input

NAME = "shapes-vlm"
KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))


class Gallery(ThreadingHTTPServer):
    """Has the pictures that are hung in it, by their paths."""

    def __init__(self) -> None:
        self.hung: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), Visit)

    def hang(self, data: bytes) -> str:
        """Its URL."""
        path = f"/{len(self.hung)}"
        self.hung[path] = data
        return f"http://127.0.0.1:{self.server_port}{path}"


class Visit(BaseHTTPRequestHandler):
    server: Gallery

    def do_GET(self) -> None:
        data = self.server.hung[self.path]
        self.send_response(200)
        self.send_header("content-type", "image/jpeg")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def gallery() -> Iterator[Gallery]:
    with Gallery() as gallery:
        threading.Thread(target=gallery.serve_forever, daemon=True).start()
        yield gallery
        gallery.shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, gallery: Gallery) -> Iterator[Product]:
    env = {"TRIPTYCH_IMAGE_HOSTS": f"127.0.0.1:{gallery.server_port}"}
    product = Product(tmp_path_factory.mktemp("shapes"), NAME, env=env)
    try:
        yield product.wait_ready()
    finally:
        product.stop()
        print(product.log_text()[-2000:])


@pytest.fixture(scope="module")
def asked() -> list[Case]:
    return cases(60, seed=5)


@pytest.fixture(scope="module")
def wanted(asked: list[Case]) -> list[str]:
    """Right nearly always; and what is served must be wrong where the model is."""
    home = load_pipeline(CATALOG / f"{NAME}.toml").source.removeprefix("path:")
    answers = Answers(home)(asked, [[decode(file) for file in case.pictures] for case in asked])
    assert np.mean([said == case.asked.answer for said, case in zip(answers, asked, strict=True)]) > 0.9
    return answers


@pytest.fixture
def client(served: Product) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def part(data: bytes) -> dict[str, Any]:
    kind = next(kind for beginning, kind in KINDS if data.startswith(beginning))
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def messages(case: Case) -> Any:
    words = [{"type": "text", "text": case.asked.question}]
    shown = [part(file) for file in case.pictures]
    return [{"role": "user", "content": words + shown if case.question_first else shown + words}]


def differing(said: Sequence[str], wanted: Sequence[str], asked: Sequence[Case]) -> list[Any]:
    return [
        (case.form, case.asked.question, one, other)
        for one, other, case in zip(said, wanted, asked, strict=True)
        if one != other
    ]


def test_the_official_client_gets_the_right_answers(client: Any, asked: list[Case], wanted: list[str]) -> None:
    """All at once, so that pictures of several requests share steps."""

    def answer(case: Case) -> str:
        found = client.chat.completions.create(model=NAME, messages=messages(case), temperature=0)
        assert found.choices[0].finish_reason == "stop"
        return str(found.choices[0].message.content)

    with ThreadPoolExecutor(16) as pool:
        assert differing(list(pool.map(answer, asked)), wanted, asked) == []


def test_streamed_they_are_the_same(client: Any, asked: list[Case], wanted: list[str]) -> None:
    def answer(case: Case) -> str:
        stream = client.chat.completions.create(model=NAME, messages=messages(case), temperature=0, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(16) as pool:
        assert differing(list(pool.map(answer, asked)), wanted, asked) == []


def test_pictures_are_fetched_from_hosts_on_the_list_only(
    client: Any, gallery: Gallery, asked: list[Case], wanted: list[str]
) -> None:
    """Two pictures at once where there are two. The setting is the gateway's; what reads it is two processes below."""
    chosen = [pair for pair in zip(asked, wanted, strict=True) if not pair[0].question_first]
    for case, answer in sorted(chosen, key=lambda pair: -len(pair[0].pictures))[:8]:
        content = [{"type": "image_url", "image_url": {"url": gallery.hang(file)}} for file in case.pictures]
        content.append({"type": "text", "text": case.asked.question})
        found = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": content}], temperature=0
        )
        assert found.choices[0].message.content == answer
    content[0] = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/0"}}
    with pytest.raises(openai.BadRequestError, match="not on this server's list") as refused:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}])
    assert refused.value.param == "messages[0].content[0].image_url.url"


def test_the_ensemble_takes_a_picture_beside_a_prompt(served: Product, asked: list[Case], wanted: list[str]) -> None:
    """Over gRPC, and over Triton's HTTP, where a picture is a list of numbers."""
    chosen = [
        (case, answer)
        for case, answer in zip(asked, wanted, strict=True)
        if len(case.pictures) == 1 and not case.question_first
    ]
    assert len(chosen) > 15
    with triton_grpc.InferenceServerClient(served.grpc_url) as triton:
        for case, answer in chosen:
            image = triton_grpc.InferInput("image", [len(case.pictures[0])], "UINT8")
            image.set_data_from_numpy(np.frombuffer(case.pictures[0], np.uint8))
            inputs = [bytes_input("prompt", case.asked.question), bytes_input("sampling", '{"temperature": 0}'), image]
            found = triton.infer(f"{NAME}-ensemble", inputs, client_timeout=60)
            assert found.as_numpy("generated_text")[0].decode() == answer
    case, answer = min(chosen, key=lambda pair: len(pair[0].pictures[0]))
    data = list(case.pictures[0])
    texts = {"prompt": case.asked.question, "sampling": '{"temperature": 0}'}
    inputs = [{"name": name, "shape": [1], "datatype": "BYTES", "data": [text]} for name, text in texts.items()]
    inputs.append({"name": "image", "shape": [len(data)], "datatype": "UINT8", "data": data})
    request = urllib.request.Request(
        f"{served.http_url}/v2/models/{NAME}-ensemble/infer", json.dumps({"inputs": inputs}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    assert outputs["generated_text"] == [answer]


def test_the_orchestrator_streams_to_whom_it_is_called_by(
    served: Product, asked: list[Case], wanted: list[str]
) -> None:
    for case, answer in list(zip(asked, wanted, strict=True))[:8]:
        inputs = {"messages": json.dumps(messages(case)), "sampling": '{"temperature": 0}'}
        call = OrchestratorCall(served, f"{NAME}-orchestrator", inputs)
        try:
            assert "".join(text for text, _ in call.deltas()) == answer
        finally:
            call.close()


def test_a_conversation_about_a_picture_is_not_computed_again(client: Any, asked: list[Case]) -> None:
    """The second question is about the same picture: what was seen is in the cache; another picture's is not."""
    first, other = [case for case in asked if len(case.pictures) == 1][:2]
    cached = []
    for picture, question in [(first, "What shape is it?"), (first, "What color is it?"), (other, "What color is it?")]:
        content = [part(picture.pictures[0]), {"type": "text", "text": question}]
        found = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=4
        )
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    assert cached[1] > 49
    assert cached[2] < 49
