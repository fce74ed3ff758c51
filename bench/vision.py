"""Pictures: what decoding costs, what the preprocess stage makes of them a second, how long a first token takes, and
how soon a hostile one is refused.

    python -m bench.vision [--rounds 5] [--pictures 40]

The second compares Triton's preprocess model, with one and two instances, in interleaved rounds with Pillow and the
model's own processor called directly, in as many processes. Both are given the same JPEGs and PNGs. The processor is
LLaVA-1.5's: 336 x 336, 576 tokens a picture. The third and the fourth are `shapes-vlm` over HTTP.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import multiprocessing
import queue
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from PIL import Image

from bench import processes
from bench.report import json_line, median, table
from pipelines.contracts import FEATURES, IMAGE, INPUT_IDS, PROMPT, model_name
from pipelines.images.decode import open_picture
from pipelines.pipeline import catalog_dirs, get_pipeline
from pipelines.sources import pull

PIPELINE = "shapes-vlm"
SEES = 336  # pixels a side, of LLaVA-1.5's eyes
PATCH = 14
CALLERS = 4
START_S = 300
QUESTION = "What color is the shape?"
MEGAPIXELS = (0.5, 2, 8, 24)

_processor: Any = None  # of a child process


def photograph(megapixels: float, seed: int = 0) -> Image.Image:
    """4:3, smooth light and fine grain, so that its JPEG is about as large as a camera's."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    size = (round(megapixels * 1e6 / height), height)
    generator = np.random.default_rng(seed)
    light = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = generator.normal(0, 6, (size[1] // 2, size[0] // 2)).repeat(2, 0).repeat(2, 1)
    pixels = np.asarray(light, dtype=np.float32)
    pixels[: grain.shape[0], : grain.shape[1]] += grain[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 85} if kind == "JPEG" else {"compress_level": 1}))
    return file.getvalue()


def decoding(rounds: int) -> list[tuple[float, float, float, float]]:
    """By megapixels, in ms: Pillow alone, ours, and ours where the model sees no more than SEES a side."""
    found = []
    for megapixels in MEGAPIXELS:
        data = encoded(photograph(megapixels), "JPEG")
        ways: list[Callable[[], object]] = [
            lambda data=data: Image.open(io.BytesIO(data)).convert("RGB"),  # type: ignore[misc]
            lambda data=data: open_picture(data, param="image", max_pixels=10**9).decode(),  # type: ignore[misc]
            lambda data=data: open_picture(data, param="image", max_pixels=10**9).decode(2 * SEES),  # type: ignore[misc]
        ]
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(rounds):
            for way, took in zip(ways, times, strict=True):
                began = time.perf_counter()
                way()
                took.append(time.perf_counter() - began)
        pillow, whole, reduced = (median(took) * 1000 for took in times)
        found.append((megapixels, pillow, whole, reduced))
    return found


@dataclass
class Served:
    http: str
    triton: str
    home: Path  # of the processor that is compared


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Served]:
    """The product with `shapes-vlm`, and two pipelines with LLaVA-1.5's processor and no model to wait for."""
    home = folder / "model"
    seeing(pull(get_pipeline(PIPELINE)), home)
    catalog = folder / "catalog"
    catalog.mkdir()
    for instances in (1, 2):
        keys = {"source": f"path:{home}", "engine": "echo", "max_images": 4, "context": 4096}
        declared = {**keys, "preprocess_instances": instances}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in declared.items())
        (catalog / f"{_name(instances)}.toml").write_text(lines, encoding="utf-8")
    folders = [str(part) for part in catalog_dirs()[1:]] + [str(catalog)]
    http, triton = processes.free_ports(), processes.free_ports(3) + 1
    serve = ["gateway.cli", "serve", "--port", str(http), "--triton-grpc-port", str(triton), "--pipeline", PIPELINE]
    serve += ["--pipeline", _name(1), "--pipeline", _name(2)]
    log = folder / "serve.log"
    with processes.running(serve, log, {"TRIPTYCH_CATALOG": ":".join(folders)}) as process:
        processes.wait_ready(process, f"http://127.0.0.1:{http}/health/ready", log, START_S)
        yield Served(f"http://127.0.0.1:{http}", f"127.0.0.1:{triton}", home)


def seeing(source: Path, target: Path) -> None:
    """The same files, but for a processor that looks at SEES a side."""
    shutil.copytree(source, target)
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (target / file).exists():
            values = json.loads((target / file).read_text())
            _enlarge(values)
            (target / file).unlink()  # it may be a link
            (target / file).write_text(json.dumps(values))


def _enlarge(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in ("size", "crop_size"):
            values[name] = dict.fromkeys(value, SEES)
        elif name == "patch_size":
            values[name] = PATCH
        elif isinstance(value, dict):
            _enlarge(value)


def _name(instances: int) -> str:
    return f"sees-{instances}"


def through_triton(served: Served, instances: int, files: Sequence[bytes]) -> float:
    """Pictures a second through the preprocess model, CALLERS at a time."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for data in files:
        waiting.put(data)
    failed: list[Exception] = []

    def call() -> None:
        client = tritonclient.grpc.InferenceServerClient(served.triton)
        outputs = [tritonclient.grpc.InferRequestedOutput(tensor.name) for tensor in (INPUT_IDS, FEATURES)]
        try:
            while True:
                data = waiting.get_nowait()
                answer = client.infer(model_name(_name(instances), "preprocess"), _inputs(data), outputs=outputs)
                if answer.as_numpy(FEATURES.name).nbytes < 3 * SEES * SEES * 4:
                    raise ValueError("the stage made less of a picture than the model sees")
        except queue.Empty:
            pass
        except Exception as error:
            failed.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=call) for _ in range(CALLERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return len(files) / (time.perf_counter() - began)


def _inputs(data: bytes) -> list[Any]:
    image = tritonclient.grpc.InferInput(IMAGE.name, [len(data)], IMAGE.wire_dtype)
    image.set_data_from_numpy(np.frombuffer(data, np.uint8))
    prompt = tritonclient.grpc.InferInput(PROMPT.name, [1], PROMPT.wire_dtype)
    prompt.set_data_from_numpy(np.array([QUESTION.encode()], dtype=np.object_))
    return [image, prompt]


def prepare_direct(home: Path) -> None:
    """In a child: what `directly` calls."""
    from pipelines.images.processor import Processor

    global _processor
    _processor = Processor.load(home)
    directly([encoded(photograph(0.1), "JPEG")])


def directly(files: Sequence[bytes]) -> int:
    """Pillow and the processor, one picture after another."""
    text = f"{_processor.image_token}\n{QUESTION}"
    for data in files:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        _processor.own(images=[picture], text=[text], return_tensors="np")
    return len(files)


def called_directly(pool: ProcessPoolExecutor, processes: int, files: Sequence[bytes]) -> float:
    began = time.perf_counter()
    done = list(pool.map(directly, [files[number::processes] for number in range(processes)]))
    return sum(done) / (time.perf_counter() - began)


def preprocessing(served: Served, rounds: int, count: int) -> list[tuple[str, int, float, float, float]]:
    """By kind of file and instances: pictures a second through Triton, directly, and their ratio by round."""
    found = []
    context = multiprocessing.get_context("spawn")
    pools = {
        number: ProcessPoolExecutor(number, context, initializer=prepare_direct, initargs=(served.home,))
        for number in (1, 2)
    }
    try:
        for kind in ("JPEG", "PNG"):
            files = [encoded(photograph(2, seed), kind) for seed in range(4)] * (count // 4)
            rates: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            for number in range(rounds + 1):  # the first warms up
                for instances, pool in pools.items():
                    ours = through_triton(served, instances, files)
                    theirs = called_directly(pool, instances, files)
                    if number:
                        rates[instances].append((ours, theirs))
            for instances, pairs in rates.items():
                ours, theirs = (median([pair[side] for pair in pairs]) for side in (0, 1))
                found.append((kind, instances, ours, theirs, median([one / other for one, other in pairs])))
    finally:
        for pool in pools.values():
            pool.shutdown()
    return found


def first_tokens(served: Served, rounds: int) -> dict[str, float]:
    """A 2 MP JPEG over HTTP for one token: by stage as Server-Timing says, in ms, and all of it."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _uri("jpeg", encoded(photograph(2), "JPEG"))}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": PIPELINE, "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
    times: dict[str, list[float]] = {}
    for number in range(rounds + 2):
        # Another text each time: what is in the engine's cache would not be computed.
        parts[1]["text"] = f"{number} {QUESTION}"
        request = urllib.request.Request(
            f"{served.http}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            stages = response.headers["server-timing"]
        if number < 2:
            continue
        times.setdefault("first_token", []).append((time.perf_counter() - began) * 1000)
        for stage in stages.split(", "):
            name, _, duration = stage.partition(";dur=")
            times.setdefault(name, []).append(float(duration))
    return {name: median(values) for name, values in times.items()}


def hostile() -> dict[str, str]:
    """URLs that no picture is had from: the largest that are taken, where size matters."""
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    large = {kind: encoded(photograph(megapixels), kind) for kind, megapixels in (("JPEG", 24), ("PNG", 6))}
    return {
        "a JPEG of 24 MP cut off": _uri("jpeg", large["JPEG"][:-2000]),
        "a PNG of 6 MP cut off": _uri("png", large["PNG"][:-2000]),
        "a PNG of 2500 MP": _uri("png", bytes(bomb)),
        "another type": _uri("webp", encoded(photograph(0.1), "JPEG")),
        "SVG": _uri("svg+xml", b"<svg/>"),
        "HTML": _uri("png", b"<html></html>"),
        "base64 of 21 MB": _uri("png", bytes(21 << 20)),
        "a metadata address": "http://169.254.169.254/latest/meta-data/",
    }


def refused(served: Served, rounds: int) -> dict[str, float]:
    """Each as the second picture of a message, in ms to the 400 that names it."""
    good = {"type": "image_url", "image_url": {"url": _uri("jpeg", encoded(photograph(0.1), "JPEG"))}}
    found = {}
    for name, url in hostile().items():
        parts = [good, {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = json.dumps({"model": PIPELINE, "messages": [{"role": "user", "content": parts}]}).encode()
        times = []
        for _ in range(rounds):
            request = urllib.request.Request(
                f"{served.http}/v1/chat/completions", body, {"content-type": "application/json"}
            )
            began = time.perf_counter()
            try:
                urllib.request.urlopen(request, timeout=60).close()
            except urllib.error.HTTPError as error:
                param = json.load(error)["error"]["param"]
                if (error.code, param) != (400, "messages[0].content[1].image_url.url"):
                    raise ValueError(f"{name} was refused with {error.code} for {param}") from None
            else:
                raise ValueError(f"{name} was taken")
            times.append((time.perf_counter() - began) * 1000)
        found[name] = median(times)
    return found


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=40, help="in one measurement")
    options = parser.parse_args(arguments)
    with processes.terminated_as_exit(), tempfile.TemporaryDirectory() as folder:
        decoded = decoding(options.rounds)
        with served(Path(folder)) as product:
            rates = preprocessing(product, options.rounds, options.pictures)
            first = first_tokens(product, 4 * options.rounds)
            refusals = refused(product, options.rounds)
    print(table(["a JPEG of … MP, ms", "Pillow", "ours", f"ours, seen at {SEES}"], decoded))
    print()
    print(table(["pictures/s", "instances", "preprocess", "directly", "ratio"], rates))
    print()
    print(table(["first token of a 2 MP JPEG, ms", "median"], list(first.items())))
    print()
    print(table(["refused, ms", "median"], list(refusals.items())))
    print(
        json_line(
            {
                "bench": "vision",
                "decode_ms": {str(megapixels): whole for megapixels, _, whole, _ in decoded},
                "decode_reduced_ms": {str(megapixels): reduced for megapixels, _, _, reduced in decoded},
                "preprocess_vs_direct": {f"{kind.lower()}_{number}": ratio for kind, number, _, _, ratio in rates},
                "first_token_ms": first,
                "refused_ms": refusals,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
