"""What a gateway's /metrics says when it has answered, failed and refused: for tests of what reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from gateway.app import create_app
from gateway.backend import Delta
from gateway.settings import Settings
from observability import metrics
from pipelines.engine import Counters
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
NAME = "scraped"
STAGES = {"preprocess": 1.5, "queue": 0.5, "prefill": 30.0, "decode": 2000.0, "postprocess": 1.0}
ACCEPTED = Delta([], prompt_tokens=3, pictures=[(40, 20)])
ANSWER = [ACCEPTED, Delta(["a"]), Delta(["b"], "stop", 3, 4, STAGES, cached_tokens=2)]


class Stream:
    def __init__(self, steps: list[Delta | StageError]) -> None:
        self.steps = list(steps)

    async def next(self) -> Delta:
        step = self.steps.pop(0)
        if isinstance(step, StageError):
            raise step
        return step

    def cancel(self) -> None:
        pass


class Backend:
    def __init__(self) -> None:
        self.steps: list[Delta | StageError] = ANSWER

    def pipelines(self) -> dict[str, Pipeline]:
        return {NAME: Pipeline(name=NAME, source="path:none")}

    def ready(self, pipeline: str) -> bool:
        return True

    async def submit(self, submission: object) -> Stream:
        return Stream(self.steps)


def client(backend: Backend, **settings: str) -> TestClient:
    return TestClient(create_app(backend, Settings(**settings)), raise_server_exceptions=False)


def chat(http: TestClient, **options: object) -> object:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Hello!"}], **options}
    return http.post("/v1/chat/completions", json=asked)


def samples() -> Iterator[tuple[str, dict[str, str]]]:
    """Name and labels of everything that a gateway can say."""
    backend = Backend()
    with client(backend) as http:
        chat(http)
        chat(http, stream=True)
        backend.steps = [ACCEPTED, Delta(["a"]), StageError("gone", code="unavailable", stage="generate")]
        chat(http, stream=True)
        chat(http, temperature=-1)
        metrics.engine_counters(NAME, dataclasses.asdict(Counters()))
        # What only a real lane, a slow client, a loss, a supervisor and several Tritons bring.
        metrics.LANE_LAG_SECONDS.labels(NAME).observe(0.001)
        metrics.LANE_MESSAGES.labels(NAME).inc(0)
        metrics.BLOCKED_SECONDS.labels(NAME).inc(0)
        metrics.CONNECTIONS_ENDED.labels("idle").inc(0)
        metrics.SUPERVISOR_EVENTS.labels(NAME, "stub_died").inc(0)
        metrics.LOAD_SECONDS.labels(NAME, "weights").observe(0.1)
        metrics.COLD_STARTS.labels(NAME).observe(0.1)
        metrics.RETRIED.labels(NAME).inc(0)
        metrics.ENDPOINT_READY.labels("a:1", NAME).set(1)
        metrics.ENDPOINT_IN_FLIGHT.labels("a:1").set(0)
        metrics.ENDPOINT_EJECTIONS.labels("a:1", NAME).inc(0)
        text = http.get("/metrics", headers={"accept": OPENMETRICS}).text
        metrics.forget_engine(NAME)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels
