"""Who may ask what, over real sockets: keys, their limits, web pages; and that no key is ever told."""

import logging
import socket

import httpx
import openai
import orjson
import pytest

from gateway import keys
from gateway.access import may_administer
from gateway.backend import Delta
from gateway.keys import Keys, line_of, new_key
from gateway.ratelimit import Limits
from gateway.settings import Settings
from observability import tracing
from tests.otlp_receiver import Receiver
from tests.scripted import (
    ACCEPTED,
    ANSWER,
    CHAT_PATH,
    COMPLETION_PATH,
    HELLO,
    PROMPT,
    ScriptedBackend,
    Server,
    wait_for,
)

ALICE, BOB, CAROL, DAVE, ADMIN = (new_key() for _ in range(5))
LIMITED = {
    "alice": (ALICE, Limits()),
    "bob": (BOB, Limits(3)),
    "carol": (CAROL, Limits(0, 1)),
    "dave": (DAVE, Limits(60)),
}


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("\n".join(line_of(name, *rest) for name, rest in LIMITED.items()))
    found = Keys.from_env({keys.API_KEYS_FILE: str(file), keys.ADMIN_KEY: ADMIN})
    with Server(ScriptedBackend(), Settings(), keys=found) as running:
        yield running


@pytest.fixture
def server(module_server):
    module_server.backend.reset()
    return module_server


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def is_refused(response, words):
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert words in error["message"]


PATHS = ["/v1/models", "/v1/models/echo", "/v1/nope", "/v1/", "/v1%2fmodels"]


@pytest.mark.parametrize("path", PATHS)
def test_everything_under_v1_needs_a_key(server, path):
    is_refused(server.get(path), "An API key is needed")
    assert httpx.get(server.url + path, headers=bearer(ALICE)).status_code in (200, 404)


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {new_key()}",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE} {ALICE}",
        "Bearer x",
        f"Basic {ALICE}",
        ALICE,
        "Bearer",
        "Bearer " + "x" * 20_000,
        f"Bearer alice:{ALICE}",
    ],
    ids=["another", "cut", "twice", "short", "basic", "bare", "none", "long", "named"],
)
def test_what_is_no_key(server, header):
    for path, body in ((CHAT_PATH, HELLO), (COMPLETION_PATH, PROMPT)):
        is_refused(server.post(path, body, authorization=header), "API key")
    assert server.backend.submissions == []


@pytest.mark.parametrize("key", [ALICE, ADMIN], ids=["alice", "admin"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_opens(server, key, scheme):
    assert server.post(CHAT_PATH, HELLO, authorization=f"{scheme} {key}").status_code == 200


def test_the_body_of_whoever_has_no_key_is_not_read(server):
    response = server.raw(
        f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1000000\r\n\r\n".encode()
    )
    assert response.startswith(b"HTTP/1.1 401 ")


def test_health_and_local_metrics_are_open(server):
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert server.get(path).status_code == 200
    for path in ("/metrics", "/metrics/triton"):
        proxied = httpx.get(server.url + path, headers={"x-forwarded-for": "192.0.2.1"})
        is_refused(proxied, "An API key is needed")
    for key in (ALICE, ADMIN):
        headers = {**bearer(key), "x-forwarded-for": "192.0.2.1"}
        assert httpx.get(server.url + "/metrics", headers=headers).status_code == 200


def test_the_official_client_with_and_without(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0, timeout=5) as client:
        assert client.chat.completions.create(**HELLO).choices[0].message.content == " Hello you"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=new_key(), max_retries=0, timeout=5) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(**HELLO)
        assert refused.value.code == "invalid_api_key"


# Limits.


def test_requests_a_minute(server):
    remaining = []
    for _ in range(3):
        response = server.post(CHAT_PATH, HELLO, **bearer(BOB))
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        remaining.append(response.headers["x-ratelimit-remaining-requests"])
        assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    assert remaining == ["2", "1", "0"]
    looked = httpx.get(server.url + "/v1/models", headers=bearer(BOB))  # and looking costs nothing
    assert (looked.status_code, looked.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    refused = server.post(CHAT_PATH, HELLO, **bearer(BOB))
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "3 requests a minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert 0 <= int(refused.headers["retry-after"]) * 1000 - int(refused.headers["retry-after-ms"]) < 1000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert server.post(CHAT_PATH, HELLO, **bearer(ALICE)).status_code == 200  # others have their own
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=BOB, max_retries=0, timeout=5) as client:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**HELLO)


def test_headers_are_on_every_answer_of_a_limited_key(server):
    for path, body, status in (
        (CHAT_PATH, HELLO, 200),
        (CHAT_PATH, {**HELLO, "stream": True}, 200),
        (CHAT_PATH, {}, 400),
        ("/v1/nope", {}, 404),
        (CHAT_PATH, b"x" * (1024 * 1024 + 1), 413),
    ):
        response = server.post(path, body, **bearer(DAVE))
        assert response.status_code == status
        assert "x-ratelimit-remaining-requests" in response.headers
    server.backend.refusal = RuntimeError("a bug")
    response = server.post(CHAT_PATH, HELLO, **bearer(DAVE))
    assert (response.status_code, "x-ratelimit-limit-requests" in response.headers) == (500, True)
    assert "x-ratelimit-limit-requests" not in server.post(CHAT_PATH, HELLO, **bearer(ALICE)).headers


@pytest.mark.parametrize(
    "end", [Delta(["Hello"], "stop", 3, 1), ValueError("a bug"), None], ids=["answer", "bug", "leave"]
)
def test_requests_at_a_time(server, end):
    server.backend.steps = [ACCEPTED, *[0.02] * 10_000]
    body = orjson.dumps(HELLO)
    head = (
        f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {CAROL}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: server.backend.streams)
        refused = server.post(CHAT_PATH, HELLO, **bearer(CAROL))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        if end:
            server.backend.streams[0].steps.appendleft(end)
            assert connection.recv(65536)
    server.backend.steps = ANSWER
    wait_for(lambda: server.post(CHAT_PATH, HELLO, **bearer(CAROL)).status_code == 200)


def test_a_changed_file_changes_the_limits(tmp_path):
    file = tmp_path / "keys"
    file.write_text(line_of("eve", ALICE, Limits(1)))
    with Server(ScriptedBackend(), Settings(), keys=Keys.from_env({keys.API_KEYS_FILE: str(file)})) as server:
        assert [server.post(CHAT_PATH, HELLO, **bearer(ALICE)).status_code for _ in range(2)] == [200, 429]
        file.write_text(line_of("eve", ALICE, Limits(1000)))
        wait_for(lambda: server.post(CHAT_PATH, HELLO, **bearer(ALICE)).status_code == 200)
        file.write_text(line_of("eve", BOB, Limits(1000)))
        wait_for(lambda: server.post(CHAT_PATH, HELLO, **bearer(ALICE)).status_code == 401)
        assert server.post(CHAT_PATH, HELLO, **bearer(BOB)).status_code == 200


# Nothing tells a key.


def test_no_key_is_in_a_log_a_metric_a_span_or_an_answer(server, caplog, monkeypatch, capfd):
    wrong, trace = new_key(), "0af7651916cd43dd8448eb211c80319c"
    with Receiver() as receiver, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        tracing.configure("triptych-gateway")
        try:
            traced = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            texts = [server.post(CHAT_PATH, HELLO, **bearer(DAVE), **traced).text]
            root = receiver.tree(trace, expect={f"POST {CHAT_PATH}"}, remote_parent="b7ad6b7169203331")
        finally:
            tracing.shutdown()
        server.backend.refusal = RuntimeError("a bug")
        answers = [server.post(CHAT_PATH, HELLO, **bearer(key)) for key in (ALICE, wrong, ADMIN)]
        server.raw(f"GET / HTTP/1.1\r\nauthorization: Bearer {wrong}\r\nbad header\r\n\r\n".encode())
    assert root.attributes["triptych.key"] == "dave"
    texts += [answer.text for answer in answers] + [str(answer.headers) for answer in answers]
    texts += [record.getMessage() + str(vars(record)) for record in caplog.records]
    texts += [server.get("/metrics").text, *capfd.readouterr()]
    texts += [str((span.name, span.attributes, span.error)) for span in root.walk()]
    assert any("a bug" in text for text in texts)  # there was something to see
    for key in (ALICE, DAVE, ADMIN, wrong):
        assert not any(key in text or keys.digest_of(key).hex() in text for text in texts)


# Web pages.

PAGE = "https://page.example"


@pytest.fixture(scope="module", params=[f"{PAGE}, http://localhost:3000", "*"])
def pages(request):
    found = Keys.from_env({keys.API_KEYS: ALICE})
    with Server(ScriptedBackend(), Settings(cors_origins=request.param), keys=found) as running:
        yield running


def test_a_preflight_needs_no_key(pages):
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    response = httpx.options(pages.url + CHAT_PATH, headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] in (PAGE, "*")
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers


def test_a_page_reads_answers_and_errors(pages):
    pages.backend.reset()
    for headers, status in (({}, 401), (bearer(ALICE), 200)):
        response = pages.post(CHAT_PATH, HELLO, origin=PAGE, **headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    pages.backend.refusal = RuntimeError("a bug")
    response = pages.post(CHAT_PATH, HELLO, origin=PAGE, **bearer(ALICE))
    assert (response.status_code, response.headers["access-control-allow-origin"] in (PAGE, "*")) == (500, True)


def test_another_page_does_not():
    with Server(ScriptedBackend(), Settings(cors_origins=PAGE)) as server:
        other = {"origin": "https://other.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in httpx.options(server.url + CHAT_PATH, headers=other).headers
        response = server.post(CHAT_PATH, HELLO, origin="https://other.example")
        assert "access-control-allow-origin" not in response.headers


def test_no_page_by_default(server):
    response = server.post(CHAT_PATH, HELLO, origin=PAGE, **bearer(ALICE))
    assert response.status_code == 200
    assert not any(name.startswith("access-control") for name in response.headers)


# Administration.


def scope(client="127.0.0.1", **headers):
    given = {"host": "127.0.0.1:8080", **headers}
    found = Keys.from_env({keys.API_KEYS: ALICE, keys.ADMIN_KEY: ADMIN})
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items() if value]
    return {"type": "http", "client": (client, 5) if client else None, "headers": pairs, "state": {"keys": found}}


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:80", "[::1]:8080"])
def test_this_machine_administers(client, host):
    assert may_administer(scope(client, host=host))


@pytest.mark.parametrize(
    "given",
    [
        {"client": "192.0.2.1"},
        {"client": "::ffff:192.0.2.1"},
        {"client": None},
        {"client": "unix"},
        {"x_forwarded_for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"x_real_ip": "127.0.0.1"},
        {"via": "1.1 proxy"},
        {"origin": "https://page.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"host": "rebound.example:8080"},
        {"host": "localhost.example"},
        {"host": ""},
        {"authorization": f"Bearer {ALICE}"},
        {"authorization": "Bearer x"},
    ],
)
def test_nobody_else_does_without_the_admin_key(given):
    assert not may_administer(scope(**given))
    assert may_administer(scope(**{**given, "authorization": f"Bearer {ADMIN}"}))
