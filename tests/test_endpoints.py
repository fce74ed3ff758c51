"""A gateway of several Tritons: who gets what, what becomes of it when one is lost, and what is said at the start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import endpoints, routing
from gateway.attached import complaints
from gateway.backend import Delta, Submission
from gateway.endpoints import Endpoints
from gateway.installed import TritonError
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline
from tests.product import Product, free_port, free_triple, wait_for

ACCEPTED, TEXT, LAST = Delta([], prompt_tokens=3), Delta(["a"]), Delta(["b"], "stop", 3, 2)
LOST = StageError("gone", code="unavailable")
A, B = "a:1", "b:1"


# Scripted lanes.


class Lanes:
    """In the place of `gateway.lane.Lanes`: its streams tell what is put in, to whoever asks."""

    made: dict[str, Lanes] = {}  # noqa: RUF012

    def __init__(self, target: str, pipelines: object, *, accept_timeout_s: float, endpoint: str) -> None:
        assert target == endpoint
        self.made[target] = self
        self.is_ready, self.streams, self.refusal = True, [], None

    async def __aenter__(self) -> Lanes:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    def open(self, pipeline: str) -> None:
        pass

    def ready(self, pipeline: str) -> bool:
        return self.is_ready

    async def submit(self, submission: Submission) -> Stream:
        if self.refusal:
            raise self.refusal
        self.streams.append(Stream())
        return self.streams[-1]


class Stream:
    def __init__(self) -> None:
        self.steps, self.cancelled = [], False

    async def next(self) -> Delta:
        step = self.steps.pop(0)
        if isinstance(step, StageError):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Played:
    """Both ends of two endpoints."""

    def __init__(self, backend: Endpoints, made: Mapping[str, Lanes]) -> None:
        self.backend, self.lanes, self.now = backend, made, 0.0

    async def ask(self, text: str = "?") -> tuple[str, Any, Stream]:
        """Where it went, what the gateway has of it, and the other end."""
        before = {target: len(lanes.streams) for target, lanes in self.lanes.items()}
        stream = await self.backend.submit(Submission("1", "m", {"text": text}, "{}", None))
        (target,) = [target for target, lanes in self.lanes.items() if len(lanes.streams) > before[target]]
        return target, stream, self.lanes[target].streams[-1]

    async def goes_to(self, text: str = "?") -> str:
        """A request that is answered at once."""
        target, stream, other = await self.ask(text)
        other.steps = [ACCEPTED, LAST]
        while not (await stream.next()).finish_reason:
            pass
        stream.cancel()
        return target


def play(scenario: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "Lanes", Lanes)
    monkeypatch.setattr(Lanes, "made", {})

    async def main() -> None:
        async with Endpoints([A, B], {"m": Pipeline(name="m", source="path:none")}, accept_timeout_s=1) as backend:
            played = Played(backend, Lanes.made)
            monkeypatch.setattr(endpoints.time, "monotonic", lambda: played.now)
            await scenario(played)
        monkeypatch.undo()

    asyncio.run(main())


def test_requests_count_until_they_end_however_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(played: Played) -> None:
        first, running, _ = await played.ask()
        other = {A: B, B: A}[first]
        assert [await played.goes_to() for _ in range(3)] == [other] * 3
        running.cancel()
        running.cancel()
        assert {await played.goes_to(), await played.goes_to()} == {A, B}

    play(scenario, monkeypatch)


def test_a_prompt_finds_its_beginning_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(played: Played) -> None:
        homes = {text: await played.goes_to(text * 500) for text in "wxyz"}
        assert set(homes.values()) == {A, B}
        assert {text: await played.goes_to(text * 600) for text in "zxwy"} == homes

    play(scenario, monkeypatch)


def test_what_is_not_ready_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(played: Played) -> None:
        played.lanes[A].is_ready = False
        assert [await played.goes_to() for _ in range(3)] == [B] * 3
        assert played.backend.ready("m")
        played.lanes[B].is_ready = False
        assert not played.backend.ready("m")
        with pytest.raises(StageError, match="ready at no endpoint") as refused:
            await played.ask()
        assert refused.value.lost

    play(scenario, monkeypatch)


def test_a_loss_ejects_for_a_while_and_a_probe_brings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(played: Played) -> None:
        lost, running, other = await played.ask("x" * 100)
        other.steps = [ACCEPTED, TEXT, LOST]
        for _ in range(2):
            await running.next()
        with pytest.raises(StageError, match="gone"):
            await running.next()
        away = {A: B, B: A}[lost]
        assert [await played.goes_to("x" * 100) for _ in range(3)] == [away] * 3
        played.now += routing.PAUSE_S
        probe, stream, end = await played.ask()
        assert probe == lost
        assert await played.goes_to() == away
        end.steps = [ACCEPTED, TEXT]
        await stream.next()
        assert await played.goes_to() == away  # that it was taken proves nothing
        await stream.next()
        busy = [await played.ask() for _ in range(4)]
        assert lost in [target for target, _, _ in busy]

    play(scenario, monkeypatch)


def test_refusals_eject_nobody_and_failures_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(played: Played, code: str) -> None:
        for _ in range(2 * routing.FAILURES):
            _, stream, other = await played.ask()
            other.steps = [StageError("no", code=code)]
            with pytest.raises(StageError):
                await stream.next()

    async def scenario(played: Played) -> None:
        await fail(played, "invalid_request")
        await fail(played, "timeout")
        assert not any(router.ejected(name) for router in played.backend._routers.values() for name in (A, B))
        await fail(played, "internal")
        assert all(router.ejected(name) for router in played.backend._routers.values() for name in (A, B))
        assert {await played.goes_to(), await played.goes_to()} == {A, B}  # better than nowhere

    play(scenario, monkeypatch)


def test_what_cannot_be_sent_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(played: Played) -> None:
        for lanes in played.lanes.values():
            lanes.refusal = LOST
        with pytest.raises(StageError, match="gone"):
            await played.ask()
        assert set(played.backend._loads.values()) == {0}

    play(scenario, monkeypatch)


# What is said at the start.

M = Pipeline(name="m", source="path:none")


def test_a_start_without_anybody_is_an_error() -> None:
    with pytest.raises(TritonError, match="no Triton answers at a:1, b:1: start one there"):
        complaints({A: None, B: None}, [M])


def test_a_pipeline_that_nobody_has_is_an_error() -> None:
    with pytest.raises(TritonError, match="'m' is loaded nowhere: a:1 lacks m-generate"):
        complaints({A: {"m": ["m-generate"]}, B: None}, [M])


def test_what_only_some_have_is_a_warning() -> None:
    found = {A: {"m": []}, B: {"m": ["m-generate", "m-orchestrator"]}, "c:1": None}
    assert complaints(found, [M]) == [
        "no Triton answers at c:1 yet",
        "b:1 does not have m-generate, m-orchestrator yet",
    ]


def test_the_command_says_who_does_not_answer(smollm2_home: Path) -> None:
    target = f"127.0.0.1:{free_triple()}"
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(free_port()), "--pipeline", "echo"]
    refused = subprocess.run([*command, "--triton", target], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"triptych: no Triton answers at {target}: start one there")


# Real servers: two products, whose supervisors bring their Tritons back, and a gateway of both.

SLOW = {"model": "echo-slow", "prompt": "a b c", "max_tokens": 4000, "stream": True}
QUICK = {"model": "echo-slow", "max_tokens": 4}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Iterator[list[Product]]:
    env = {"TRIPTYCH_CATALOG": str(catalog)}
    products = [Product(tmp_path_factory.mktemp("server"), "echo-slow", env=env) for _ in range(2)]
    try:
        yield [product.wait_ready() for product in products]
    finally:
        for product in products:
            product.stop()


@pytest.fixture
def gateway(tmp_path: Path, catalog: Path, servers: list[Product]) -> Iterator[Product]:
    targets = [product.grpc_url for product in servers]
    product = Product(tmp_path, "echo-slow", env={"TRIPTYCH_CATALOG": str(catalog)}, tritons=targets)
    try:
        product.wait_ready()
        wait_for(lambda: all(ready(product, target) for target in targets), 30)
        yield product
    finally:
        assert product.stop() == 0
        print(product.log_text()[-3000:])


def measured(product: Product) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{product.url}/metrics", timeout=30).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def of(product: Product, name: str, endpoint: str) -> float:
    found = measured(product)
    labels = {"endpoint": endpoint, "pipeline": "echo-slow"}
    return found.get((name, frozenset(labels.items())), found.get((name, frozenset([("endpoint", endpoint)])), 0.0))


def ready(product: Product, endpoint: str) -> bool:
    return bool(of(product, "triptych_endpoint_ready", endpoint))


def finished(servers: list[Product]) -> list[int]:
    return [server.counters("echo-slow-generate")["finished"] for server in servers]


def ask(product: Product, **body: Any) -> httpx.Response:
    return httpx.post(f"{product.url}/v1/completions", json={**QUICK, **body}, timeout=90)


def test_requests_are_balanced_and_measured_by_endpoint(gateway: Product, servers: list[Product]) -> None:
    before = finished(servers)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda number: ask(gateway, prompt=f"{number} b c", max_tokens=50), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert [after - earlier for after, earlier in zip(finished(servers), before, strict=True)] == [8, 8]
    for server in servers:
        wait_for(lambda: of(gateway, "triptych_endpoint_requests_in_flight", server.grpc_url) == 0, 10)  # noqa: B023
        assert of(gateway, "triptych_endpoint_ejections_total", server.grpc_url) == 0
        wait_for(lambda: of(gateway, "triptych_engine_finished_total", server.grpc_url) >= 8, 10)  # noqa: B023
        scraped = httpx.get(f"{gateway.url}/metrics/triton", params={"endpoint": server.grpc_url}, timeout=30)
        assert 'nv_inference_request_success{model="echo-slow-generate"' in scraped.text
    assert httpx.get(f"{gateway.url}/metrics/triton", timeout=30).status_code == 200
    unknown = httpx.get(f"{gateway.url}/metrics/triton", params={"endpoint": "example.com:80"}, timeout=30)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "endpoint")


def test_a_conversation_stays_where_it_began(gateway: Product, servers: list[Product]) -> None:
    """Two of them, turn by turn: each server has all turns of one."""
    talks = {
        name: f"{name}: a question that is long enough to be known again when it comes back, with more" for name in "xy"
    }
    homes: dict[str, set[int]] = {name: set() for name in talks}
    for _ in range(4):
        for name in talks:
            before = finished(servers)
            answer = ask(gateway, prompt=talks[name]).json()
            talks[name] += answer["choices"][0]["text"]
            (home,) = [index for index in range(2) if finished(servers)[index] > before[index]]
            homes[name].add(home)
    assert sorted(map(sorted, homes.values())) == [[0], [1]]


def test_a_server_is_killed_and_what_had_not_begun_goes_to_the_other(gateway: Product, servers: list[Product]) -> None:
    """A stream on each; whole answers on both. The one server's stream ends in an error, and nothing else does."""
    streams: list[list[str]] = [[], []]

    def stream(number: int) -> None:
        body = {**SLOW, "prompt": f"{number} b c", "max_tokens": 600}
        with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=90) as response:
            for line in response.iter_lines():
                streams[number].append(line)

    with ThreadPoolExecutor(16) as threads:
        running = [threads.submit(stream, number) for number in range(2)]
        wait_for(lambda: all(len(lines) > 4 for lines in streams), 30)
        before = [server.counters("echo-slow-generate")["running"] for server in servers]
        assert before == [1, 1]
        whole = [threads.submit(ask, gateway, prompt=f"{number} d e", max_tokens=200) for number in range(8)]
        wait_for(lambda: [server.counters("echo-slow-generate")["running"] for server in servers] == [5, 5], 30)
        os.kill(servers[0].triton(), signal.SIGKILL)
        answers = [call.result() for call in whole]
        for call in running:
            call.result()

    assert [answer.status_code for answer in answers] == [200] * 8
    for number, answer in enumerate(answers):
        assert answer.json()["usage"]["completion_tokens"] == 200
        assert answer.json()["choices"][0]["text"].startswith(f"{number} d e")
    ends = [[line for line in lines if line.startswith("data: ")][-1] for lines in streams]
    (broken,) = [end for end in ends if end != "data: [DONE]"]
    assert json.loads(broken[6:])["error"]["code"] == "unavailable"
    assert of(gateway, "triptych_endpoint_ejections_total", servers[0].grpc_url) == 1
    assert measured(gateway)["triptych_requests_retried_total", frozenset([("pipeline", "echo-slow")])] == 4
    assert gateway.get("/health/ready") == (200, {"status": "ready", "not_ready": []})

    servers[0].wait_ready()
    wait_for(lambda: ready(gateway, servers[0].grpc_url), 90)
    earlier = finished(servers)[0]

    def used_again() -> bool:
        with ThreadPoolExecutor(8) as threads:
            assert {call.status_code for call in threads.map(lambda n: ask(gateway, prompt=f"{n} f g"), range(8))} == {
                200
            }
        return finished(servers)[0] > earlier

    wait_for(used_again, 60)


def test_a_pipeline_that_is_unloaded_at_one_server_is_served_by_the_other(
    gateway: Product, servers: list[Product]
) -> None:
    """As a rollout does it: what runs ends, what comes goes elsewhere, and nobody hears of it. (The product whose
    server it is takes the unloading for a death, and loads it again.)"""
    client = servers[0].client()
    try:
        with ThreadPoolExecutor(24) as threads:
            running = [threads.submit(ask, gateway, prompt=f"{number} h i", max_tokens=150) for number in range(8)]
            wait_for(lambda: [server.counters("echo-slow-generate")["running"] for server in servers] == [4, 4], 30)
            client.unload_model("echo-slow-orchestrator")
            more = [threads.submit(ask, gateway, prompt=f"{number} j k") for number in range(16)]
            assert [call.result().status_code for call in [*running, *more]] == [200] * 24
        assert ask(gateway, prompt="l m n").status_code == 200
    finally:
        client.load_model("echo-slow-orchestrator")
        client.close()
    wait_for(lambda: ready(gateway, servers[0].grpc_url), 60)
