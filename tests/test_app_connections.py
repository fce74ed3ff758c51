"""Clients that leave, connections that are kept, and the names of requests; a backend that plays scripts."""

import http.client
import socket
import threading
import time

import httpx
import orjson
import pytest

from gateway.backend import Delta
from tests.scripted import (
    ACCEPTED,
    ANSWER,
    CHAT_PATH,
    COMPLETION_PATH,
    FOREVER,
    HELLO,
    MODEL,
    PROMPT,
    raw_request,
    wait_for,
)

# Disconnects.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(server, backend, stream):
    backend.steps = [ACCEPTED, Delta(["a"]), FOREVER]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": stream})
    wait_for(lambda: backend.streams and len(backend.streams[0].steps) == 0)
    connection.close()
    assert backend.streams[0].cancelled.wait(5)


def test_a_client_that_leaves_while_the_server_writes(server, backend):
    backend.steps = [ACCEPTED, *[0, Delta(["x" * 100_000])] * 5000]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": True})
    connection.recv(1000)
    steps = backend.streams[0].steps

    def stalled():  # the socket's buffers are full, and the server waits for this client
        left = len(steps)
        time.sleep(0.05)
        return len(steps) == left

    wait_for(stalled)
    waiting = len(steps)
    assert waiting > 0
    connection.close()
    assert backend.streams[0].cancelled.wait(5)
    assert len(steps) > waiting - 100  # it did not go on writing to nobody


def test_a_client_that_leaves_before_acceptance(server, backend):
    backend.steps = [FOREVER]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": True})
    wait_for(lambda: backend.streams)
    connection.close()
    assert backend.streams[0].cancelled.wait(0.2)


def test_a_client_that_leaves_in_the_middle_of_its_body(server, backend):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(CHAT_PATH, HELLO)[:-10])
    assert server.post(CHAT_PATH, HELLO).status_code == 200
    assert len(backend.submissions) == 1


# Connections and ids.


def test_pipelined_requests_are_answered_in_order(server, backend):
    response = server.raw(
        raw_request(CHAT_PATH, HELLO, "x-request-id: one"),
        raw_request(CHAT_PATH, {**HELLO, "stream": True}, "x-request-id: two"),
        raw_request("/v1/nope", {}, "x-request-id: three"),
        raw_request(COMPLETION_PATH, PROMPT, "x-request-id: four", "connection: close"),
    )
    order = [response.index(f"x-request-id: {name}".encode()) for name in ("one", "two", "three", "four")]
    assert order == sorted(order)
    assert response.count(b"HTTP/1.1 ") == 4
    assert len(backend.submissions) == 3


def test_a_connection_is_kept_after_every_kind_of_answer(server, backend):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.connect()
    first = connection.sock
    for path, body in [
        (CHAT_PATH, HELLO),
        (CHAT_PATH, {**HELLO, "stream": True}),
        (CHAT_PATH, {}),
        ("/x", {}),
    ]:
        connection.request("POST", path, body=orjson.dumps(body))
        connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_one_request_id_twice_at_once(server, backend):
    backend.steps = [0.2, *ANSWER]
    responses = []
    threads = [
        threading.Thread(target=lambda: responses.append(server.post(CHAT_PATH, HELLO, **{"x-request-id": "same"})))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert [response.headers["x-request-id"] for response in responses] == ["same", "same"]
    ids = [submission.id for submission in backend.submissions]
    assert len(set(ids)) == 2
    assert all(id.startswith("same.") for id in ids)


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "h\xe9", "a\tb"])
def test_an_insane_request_id_is_replaced(server, bad):
    response = server.raw(
        raw_request("/v1/nope", {}, "connection: close").replace(
            b"host: test", f"x-request-id: {bad}".encode("latin-1")
        )
    )
    assert b"x-request-id: req_" in response


def test_every_response_has_its_id_and_timing(server):
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/health/live", "/health/ready", "/metrics", "/nope"):
        response = httpx.get(server.url + path, headers={"x-request-id": "k" * 128})
        assert response.headers["x-request-id"] == "k" * 128
        assert response.headers["server-timing"].startswith("total;dur=")
