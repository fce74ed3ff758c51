"""Pictures through the real Triton: the ensemble, its HTTP, a stream, the gateway; and what the bad and the many do.

The model is a tiny LLaVA's real processor before an echo: what is asked here is what becomes of a picture on its way.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
from PIL import Image

from observability.completeness import check
from observability.spans import read_document
from pipelines.images.features import Features, unpack
from tests import vision
from tests.orchestrator_call import OrchestratorCall
from tests.otlp_receiver import Receiver
from tests.product import Product, bytes_input, wait_for

PICTURE_TOKENS = 4  # of this model, for a picture
WORDS = "What is this?"
# A gate for three of the large pictures below at a time, in each of two processes.
KEYS = 'engine = "echo"\nmax_images = 3\nimage_memory_mb = 96\npreprocess_instances = 2\nmax_pixels = 2_000_000'


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.home("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, catalog: Path, llava: Path, otlp: Receiver) -> Iterator[Product]:
    """A pipeline that takes pictures, and one that does not."""
    folder = tmp_path_factory.mktemp("seeing")
    (folder / "seeing.toml").write_text(f'source = "path:{llava}"\n{KEYS}\n')
    env = {
        "TRIPTYCH_CATALOG": f"{catalog}:{folder}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    product = Product(folder, "seeing", "echo-small", env=env)
    try:
        yield product.wait_ready()
    finally:
        product.stop()
        print(product.log_text()[-2000:])


@pytest.fixture
def client(seeing: Product) -> Any:
    return openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=120)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture(seed: int = 1, size: tuple[int, int] = (40, 30)) -> bytes:
    return encoded(vision.picture(seed, size))


def part(data: bytes) -> Any:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def ask(*content: Any) -> Any:
    words = {"type": "text", "text": WORDS}
    return [{"role": "user", "content": [*content, words]}]


def image_input(data: bytes) -> Any:
    tensor = triton_grpc.InferInput("image", [len(data)], "UINT8")
    tensor.set_data_from_numpy(np.frombuffer(data, dtype=np.uint8))
    return tensor


def sampling(**more: Any) -> Any:
    return bytes_input("sampling", json.dumps({"temperature": 0, **more}))


@pytest.fixture
def prepared(seeing: Product) -> Any:
    """What the preprocess model answers: ids, features, sizes of the pictures."""

    def run(*inputs: Any) -> tuple[list[int], Features | None, list[list[int]]]:
        with triton_grpc.InferenceServerClient(seeing.grpc_url) as client:
            found = client.infer("seeing-preprocess", list(inputs), client_timeout=60)
        packed = found.as_numpy("features")
        features = unpack(packed) if packed.size else None
        return found.as_numpy("input_ids").tolist(), features, json.loads(found.as_numpy("pictures")[0])

    return run


def test_features_are_those_of_the_model_s_own_processor(prepared: Any, llava: Path) -> None:
    images = [vision.picture(1, (40, 30)), vision.picture(2, (25, 60))]
    ids, features, sizes = prepared(
        bytes_input("messages", json.dumps(ask(*[part(encoded(image)) for image in images])))
    )
    assert sizes == [[40, 30], [25, 60]]
    assert features is not None
    wanted = vision.processor(llava).image_processor(images, return_tensors="np")["pixel_values"]
    assert np.array_equal(features.arrays["pixel_values"], np.asarray(wanted))
    assert len(features.identity) == len(ids)
    assert sum(number < 0 for number in features.identity) == 2 * PICTURE_TOKENS


def test_a_text_has_none(prepared: Any) -> None:
    _, features, sizes = prepared(bytes_input("prompt", WORDS))
    assert (features, sizes) == (None, [])


def test_an_image_beside_a_prompt_is_the_part_before_the_text(prepared: Any) -> None:
    data = picture()
    beside = prepared(bytes_input("prompt", WORDS), image_input(data))
    within = prepared(bytes_input("messages", json.dumps(ask(part(data)))))
    assert beside[0] == within[0]
    assert beside[1].identity == within[1].identity
    assert beside[2] == within[2] == [[40, 30]]


def test_every_way_in_takes_text_and_pictures(seeing: Product, client: Any) -> None:
    def whole(*inputs: Any) -> str:
        with triton_grpc.InferenceServerClient(seeing.grpc_url) as grpc:
            found = grpc.infer("seeing-ensemble", [*inputs, sampling()], client_timeout=60)
        text: str = found.as_numpy("generated_text")[0].decode()
        return text

    def over_http(**inputs: Any) -> str:
        kinds = {"image": "UINT8"}
        tensors = [
            {
                "name": name,
                "shape": [len(value)] if name in kinds else [1],
                "datatype": kinds.get(name, "BYTES"),
                "data": list(value) if name in kinds else [value],
            }
            for name, value in {**inputs, "sampling": '{"temperature": 0}'}.items()
        ]
        body = json.dumps({"inputs": tensors}).encode()
        with urllib.request.urlopen(f"{seeing.http_url}/v2/models/seeing-ensemble/infer", body, timeout=60) as answer:
            outputs = {output["name"]: output["data"][0] for output in json.load(answer)["outputs"]}
        text: str = outputs["generated_text"]
        return text

    def streamed(**inputs: str) -> str:
        call = OrchestratorCall(seeing, "seeing-orchestrator", {**inputs, "sampling": '{"temperature": 0}'})
        try:
            return "".join(text for text, _ in call.deltas())
        finally:
            call.close()

    def chat(messages: Any, **more: Any) -> str:
        answer = client.chat.completions.create(model="seeing", messages=messages, temperature=0, **more)
        if not more:
            return str(answer.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    data = picture()
    messages = json.dumps(ask(part(data)))
    pictured = {
        whole(bytes_input("prompt", WORDS), image_input(data)),
        whole(bytes_input("messages", messages)),
        over_http(prompt=WORDS, image=data),
        over_http(messages=messages),
        streamed(messages=messages),
        chat(ask(part(data))),
        chat(ask(part(data)), stream=True),
    }
    plain = {
        whole(bytes_input("prompt", WORDS)),
        over_http(prompt=WORDS),
        streamed(prompt=WORDS),
        chat(ask()),
        chat(ask(), stream=True),
    }
    assert len(pictured) == 1
    assert len(plain) == 1
    assert all(WORDS in text for text in pictured | plain)


def test_a_stream_takes_an_image_tensor(seeing: Product) -> None:
    answers: list[Any] = []
    done = threading.Event()

    def hear(result: Any, error: Any) -> None:
        answers.append(error or result)
        if error or result.get_response().parameters["triton_final_response"].bool_param:
            done.set()

    with triton_grpc.InferenceServerClient(seeing.grpc_url) as client:
        client.start_stream(hear)
        tensors = [bytes_input("prompt", WORDS), image_input(picture()), sampling(max_tokens=9)]
        client.async_stream_infer("seeing-orchestrator", tensors, enable_empty_final_response=True)
        assert done.wait(60)
        client.stop_stream()
    texts = [answer.as_numpy("generated_text") for answer in answers]
    assert "".join(text[0].decode() for text in texts if text is not None)


def test_pictures_are_tokens_of_the_prompt(client: Any) -> None:
    def used(*content: Any) -> int:
        answer = client.chat.completions.create(model="seeing", messages=ask(*content), max_tokens=1)
        tokens: int = answer.usage.prompt_tokens
        return tokens

    one, two, three = (used(*[part(picture(seed)) for seed in range(count)]) for count in (1, 2, 3))
    assert three - two == two - one >= PICTURE_TOKENS


HOSTILE = {
    "cut off": picture()[:300],
    "no picture": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "empty": b"",
    "without pixels": encoded(Image.new("RGB", (4, 4)), "BMP").replace(bytes((4, 0, 0, 0)), bytes(4), 1),
    "a bomb": encoded(Image.new("1", (50_000, 50_000))),
    "a line": encoded(Image.new("RGB", (2000, 1))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_picture_is_named_and_harms_nobody(seeing: Product, client: Any, name: str) -> None:
    bad = ask(part(picture()), part(HOSTILE[name]))
    good = {"model": "seeing", "messages": ask(part(picture())), "temperature": 0}
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(client.chat.completions.create, **good) for _ in range(6)]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="seeing", messages=[{"role": "system", "content": "a"}, *bad])
        assert refused.value.param == "messages[1].content[1].image_url.url"
        assert "messages[1].content[1]" in refused.value.message
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="seeing", messages=bad, stream=True)
        assert len({other.result().choices[0].message.content for other in others}) == 1
    with triton_grpc.InferenceServerClient(seeing.grpc_url) as grpc:
        with pytest.raises(triton_grpc.InferenceServerException, match='"param": "image"'):
            grpc.infer("seeing-ensemble", [bytes_input("prompt", WORDS), image_input(HOSTILE[name])], client_timeout=60)


HOSTILE_URLS = {
    "of another type": f"data:image/png;base64,{base64.b64encode(picture()).decode()}".replace("png", "webp", 1),
    "of no type for pictures": f"data:text/html;base64,{base64.b64encode(b'<html></html>').decode()}",
    "not base64": "data:image/png;base64,%%%%",
    "gigantic": f"data:image/png;base64,{'A' * (28 << 20)}",
    "a file": "file:///etc/passwd",
    "this machine": "http://127.0.0.1/a.png",
    "the cloud's metadata": "http://169.254.169.254/latest/meta-data/",
}


@pytest.mark.parametrize("name", HOSTILE_URLS)
def test_a_bad_url_is_named(client: Any, name: str) -> None:
    bad = {"type": "image_url", "image_url": {"url": HOSTILE_URLS[name]}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="seeing", messages=ask(part(picture()), bad))
    assert (refused.value.code, refused.value.param) == ("invalid_image", "messages[0].content[1].image_url.url")
    assert refused.value.param in refused.value.message


def test_too_many_and_where_none_is_taken(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as many:
        client.chat.completions.create(model="seeing", messages=ask(*[part(picture())] * 4))
    assert many.value.param == "messages[0].content[3].type"
    with pytest.raises(openai.BadRequestError) as blind:
        client.chat.completions.create(model="echo-small", messages=ask(part(picture())))
    assert blind.value.param == "messages[0].content[0].type"


def test_megabytes_come_through(client: Any, seeing: Product) -> None:
    """A body of some 15 MB and one that is too large; other requests on the same lane go on."""
    noise = encoded(Image.effect_noise((1999, 1000), 90).convert("RGB"), "BMP")
    text = base64.b64encode(noise).decode()
    large = {"type": "image_url", "image_url": {"url": f"data:image/bmp;base64,{text}"}}
    answer = client.chat.completions.create(model="seeing", messages=ask(large, large), max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(
            model="seeing", messages=ask(*[large] * 3, {"type": "text", "text": "x" * 2**23})
        )
    assert refused.value.status_code == 413
    assert seeing.get("/health/ready")[0] == 200


def test_a_burst_of_large_pictures_is_answered(seeing: Product, client: Any) -> None:
    """More than fit into the memory for decoding at once, and text beside them."""
    data = picture(3, (1400, 1400))
    pictured = {"model": "seeing", "messages": ask(part(data)), "temperature": 0}
    plain = {"model": "seeing", "messages": ask(), "temperature": 0}
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(client.chat.completions.create, **given) for given in [pictured] * 18 + [plain] * 6]
        texts = [one.result(timeout=120).choices[0].message.content for one in asked]
    assert len(set(texts[:18])) == len(set(texts[18:])) == 1


STAGES = {"preprocess", "generate", "postprocess"}
STEPS = {"render", "image.fetch", "image.decode", "tokenize", "queue", "prefill", "decode"}
TRACED = sorted({"POST /v1/chat/completions", "admission", "chat seeing", *STAGES, *STEPS})


def test_the_trace_says_what_was_read(seeing: Product, client: Any, otlp: Receiver) -> None:
    trace_id, span_id = os.urandom(16).hex(), os.urandom(8).hex()
    header = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    client.chat.completions.create(
        model="seeing", messages=ask(*[part(picture(seed)) for seed in range(3)]), extra_headers=header
    )
    found = otlp.spans_of(trace_id, timeout=30, count=len(TRACED))
    assert sorted(span.name for span in found) == TRACED
    with urllib.request.urlopen(f"{seeing.url}/admin/traces/{trace_id}", timeout=30) as response:
        assert check(read_document(response.read()), expect=TRACED, remote_parent=span_id) == []
    fetched, decoded, tokenized = (
        next(span.attributes for span in found if span.name == name)
        for name in ("image.fetch", "image.decode", "tokenize")
    )
    assert fetched["triptych.image.bytes"] == sum(len(picture(seed)) for seed in range(3))
    assert decoded["triptych.image.count"] == 3
    assert decoded["triptych.image.widths"] == [40, 40, 40]
    assert tokenized["triptych.features.bytes"] == 3 * (28 * 28 * 3) * 4  # as float32


def test_one_of_two_processes_dies_and_both_are_replaced(seeing: Product, client: Any) -> None:
    stubs = lambda: {pid for pid, command in seeing.family().items() if "/seeing-preprocess/1/" in command}  # noqa: E731
    wait_for(lambda: len(stubs()) == 2, 30)
    before = stubs()
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: len(stubs()) == 2 and not stubs() & before, 120, "two new processes")
    wait_for(lambda: seeing.get("/health/ready")[0] == 200, 120)
    for _ in range(6):  # both answer
        assert client.chat.completions.create(model="seeing", messages=ask(part(picture())), max_tokens=3).choices
