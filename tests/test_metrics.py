"""What is scraped parses, and says what was put in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time

import pytest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway import scrape
from observability import metrics, tracing
from pipelines.engine import Counters
from tests.otlp_receiver import Receiver
from tests.scraped import NAME, OPENMETRICS, STAGES, Backend, chat, client


def _samples(accept: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    pieces, content_type = metrics.render(accept)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    samples = (sample for family in parse(b"".join(pieces).decode()) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def _labels(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def test_requests_are_counted_by_pipeline_operation_and_status():
    metrics.REQUEST_SECONDS.labels("m", "chat", "200").observe(0.03)
    metrics.FIRST_TOKEN_SECONDS.labels("m").observe(60)
    metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels("m").observe(0.002)
    metrics.TOKENS.labels("m", "input").inc(7)
    metrics.TOKENS.labels("m", "output").inc(9)
    metrics.ABORTED.labels("m", "disconnect").inc()
    metrics.LANE_MESSAGES.labels("m").inc(2)
    metrics.PIPELINE_READY.labels("m").set(1)
    metrics.IN_FLIGHT.labels("m").inc()
    metrics.QUEUED.labels("m").set(4)
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        got = _samples(accept)
        request = {"pipeline": "m", "operation": "chat", "status": "200"}
        name = "gen_ai_server_request_duration_seconds"
        assert got[f"{name}_bucket", _labels(**request, le="0.04")] == 1
        assert got[f"{name}_bucket", _labels(**request, le="0.02")] == 0
        first = "gen_ai_server_time_to_first_token_seconds_bucket"
        assert got[first, _labels(pipeline="m", le="80.0")] == 1
        assert got[first, _labels(pipeline="m", le="40.0")] == 0
        assert got["triptych_tokens_total", _labels(pipeline="m", type="output")] == 9
        assert got["triptych_requests_aborted_total", _labels(pipeline="m", reason="disconnect")] == 1
        assert got["triptych_pipeline_ready", _labels(pipeline="m")] == 1
        assert got["triptych_requests_queued", _labels(pipeline="m")] == 4


def test_an_engines_own_counters_are_passed_on_as_they_are():
    given = {"running": 2, "waiting": 0, "steps": 100, "step_ns": 2_500_000_000, "output_tokens": 300, "other": 1}
    metrics.engine_counters("m", given)
    got = _samples()
    assert got["triptych_engine_step_seconds_total", _labels(pipeline="m")] == 2.5
    assert got["triptych_engine_running", _labels(pipeline="m")] == 2
    assert got["triptych_engine_steps_total", _labels(pipeline="m")] == 100
    assert ("triptych_engine_finished_total", _labels(pipeline="m")) not in got
    metrics.engine_counters("m", {"steps": 3})  # it restarted: a reset, which Prometheus knows
    assert _samples()["triptych_engine_steps_total", _labels(pipeline="m")] == 3
    metrics.forget_engine("m")
    assert ("triptych_engine_steps_total", _labels(pipeline="m")) not in _samples()


def test_the_process_and_its_spans_are_there():
    got = _samples()
    assert got["process_resident_memory_bytes", ()] > 0
    assert got["triptych_spans_total", _labels(outcome="failed")] == 0


def test_every_metric_has_help():
    pieces, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    lines = b"".join(pieces).decode().splitlines()
    helps = {line.split(" ", 3)[2]: line.split(" ", 3)[3:] for line in lines if "# HELP" in line}
    assert helps
    assert all(text and text[0].strip() for text in helps.values())


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_pieces_are_what_the_whole_is(accept):
    encode, content_type = choose_encoder(accept)
    pieces, told = metrics.render(accept)
    ours = b"".join(pieces).splitlines()
    whole = encode(metrics.REGISTRY).splitlines()
    assert told == content_type
    assert [line for line in ours if not line.startswith(b"process_")] == [
        line
        for line in whole
        if not line.startswith(b"process_")  # its processor time goes on
    ]


def test_others_are_served_while_a_scrape_is_written(monkeypatch):
    """All of it at once took 11 ms, and for so long nobody was."""
    turns = []

    def pieces(accept):
        for _ in range(5):
            turns.append(asyncio.get_running_loop().time())
            asyncio.get_running_loop().call_soon(turns.append, "another's")
            yield b""

    monkeypatch.setattr(metrics, "render", lambda accept: (pieces(accept), "text/plain"))
    with client(Backend()) as http:
        http.get("/metrics")
    assert [turn == "another's" for turn in turns] == [False, True] * 5


def test_every_count_of_an_engine_is_told():
    counters = {field.name for field in dataclasses.fields(Counters)}
    assert counters == set(metrics._ENGINE_GAUGES) | set(metrics._ENGINE_COUNTERS)


def _of(http, accept=OPENMETRICS):
    families = parse_openmetrics(http.get("/metrics", headers={"accept": accept}).text)
    return [sample for family in families for sample in family.samples]


def test_an_answer_is_measured_by_stage_and_token():
    before = _samples()

    def more(name, **labels):
        key = name, _labels(pipeline=NAME, **labels)
        return _samples()[key] - before.get(key, 0)

    with client(Backend()) as http:
        chat(http)
        chat(http, stream=True)
    for stage, ms in STAGES.items():
        assert more("triptych_stage_duration_seconds_count", stage=stage) == 2
        assert more("triptych_stage_duration_seconds_sum", stage=stage) == pytest.approx(2 * ms / 1000)
    assert {kind: more("triptych_tokens_total", type=kind) for kind in ("input", "output", "cached")} == {
        "input": 6,
        "output": 8,
        "cached": 4,
    }
    assert more("triptych_cache_hits_total") == 2
    assert more("triptych_images_total") == 2
    assert more("triptych_image_bytes_total") == 2 * 3 * 40 * 20
    assert more("triptych_queue_wait_seconds_count") == 2


@pytest.mark.parametrize("sampled", [True, False])
def test_a_sampled_request_is_an_exemplar(monkeypatch, sampled):
    trace = f"{time.time_ns():032x}"
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.delenv("OTEL_TRACES_SAMPLER", raising=False)
        tracing.configure("triptych-gateway")
        try:
            with client(Backend()) as http:
                headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-0{int(sampled)}"}
                asked = {"model": NAME, "messages": [{"role": "user", "content": "Hello!"}]}
                assert http.post("/v1/chat/completions", json=asked, headers=headers).status_code == 200
                told = _of(http)
                assert trace not in http.get("/metrics").text  # the older format has none
        finally:
            tracing.shutdown()
    found = {sample.name for sample in told if sample.exemplar and sample.exemplar.labels == {"trace_id": trace}}
    names = (
        "gen_ai_server_request_duration_seconds",
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_time_per_output_token_seconds",
        "triptych_stage_duration_seconds",
        "triptych_queue_wait_seconds",
    )
    assert found == ({f"{name}_bucket" for name in names} if sampled else set())


def test_no_label_is_a_clients_to_choose():
    mark = "invented-by-a-client"
    with client(Backend()) as http:
        asked = {"model": mark, "messages": [{"role": "user", "content": mark}], "user": mark}
        assert http.post("/v1/chat/completions", json=asked).status_code == 404
        assert http.post(f"/v1/{mark}", json=asked).status_code == 404
        chat(http, user=mark, metadata={mark: mark}, seed=mark)
        chat(http, user=mark, metadata={mark: mark})
        http.request(mark.upper(), "/v1/chat/completions", headers={"x-request-id": mark})
        assert mark not in http.get("/metrics").text.lower()


# Triton's.


@contextlib.contextmanager
def triton(*answers):
    """Something at the metrics port; answers the setting that leads there. It reads a request, sends, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    for answer in answers:
                        connection.sendall(answer)
                    if not answers:
                        done.wait(30)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1] - 1}"
        done.set()
    thread.join(5)


def _scraped(address):
    with client(Backend(), triton_grpc=address) as http:
        return http.get("/metrics/triton")


def test_tritons_metrics_are_passed_on():
    body = b'nv_inference_count{model="m",version="1"} 5\n'
    with triton(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", body) as address:
        response = _scraped(address)
    assert (response.status_code, response.content) == (200, body)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "answers", [[b"HTTP/1.1 404 Not Found\r\n\r\n"], [b"HTTP/1.1 200 OK\r\n"], [b"", b""], [b"\x00"]]
)
def test_what_is_no_answer_is_a_503(answers):
    with triton(*answers) as address:
        response = _scraped(address)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "unavailable"


def test_a_triton_that_is_away_is_a_503():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    response = _scraped(f"127.0.0.1:{port - 1}")
    assert response.status_code == 503
    assert "Triton's metrics cannot be read" in response.json()["error"]["message"]


def test_a_triton_that_hangs_is_a_503(monkeypatch):
    monkeypatch.setattr(scrape, "TIMEOUT_S", 0.2)
    with triton() as address:
        response = _scraped(address)
    assert response.status_code == 503
    assert "no answer within 0.2 s" in response.json()["error"]["message"]


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(scrape, "_MOST_BYTES", 1000)
    with triton(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 2000) as address:
        assert _scraped(address).status_code == 503


def test_of_several_engines_each_has_its_endpoint():
    metrics.engine_counters("m", {"steps": 3}, "a:1")
    metrics.engine_counters("m", {"steps": 5}, "b:1")
    metrics.engine_counters("m", {"steps": 7})
    steps = "triptych_engine_steps_total"
    for accept in ("", OPENMETRICS):
        got = _samples(accept)
        assert [got[steps, _labels(pipeline="m", endpoint=name)] for name in ("a:1", "b:1")] == [3, 5]
        assert got[steps, _labels(pipeline="m")] == 7
    metrics.forget_engine("m", "a:1")
    assert (steps, _labels(pipeline="m", endpoint="a:1")) not in _samples()
    metrics.forget_engine("m", "b:1")
    metrics.forget_engine("m")


def test_of_several_tritons_one_is_asked_for_by_name():
    body = b"nv_inference_count 5\n"
    with triton(b"HTTP/1.1 200 OK\r\n\r\n", body) as address:
        with client(Backend(), triton=f"127.0.0.1:1,{address}") as http:
            assert http.get("/metrics/triton").status_code == 503  # the first's
            unknown = http.get("/metrics/triton?endpoint=example.com:8001")
            assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "endpoint")
            assert http.get(f"/metrics/triton?endpoint={address}").content == body
