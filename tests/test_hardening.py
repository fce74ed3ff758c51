"""What hostile and broken clients do to the gateway, over real sockets. Its process is watched.

Of each fault three things are asked: what it is answered, that others are served meanwhile, and that memory stays flat.
No time is asserted, but for deadlines that catch hangs.
"""

import contextlib
import gzip
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from gateway.bounded import MAX_AHEAD, MAX_HEADERS
from gateway.protocol import CHAT
from tests.scripted import unchunk

MB = 1024 * 1024
HANG_S = 20
SETTINGS = {
    "TRIPTYCH_HEADER_TIMEOUT_S": "1",
    "TRIPTYCH_BODY_TIMEOUT_S": "2",
    "TRIPTYCH_WRITE_TIMEOUT_S": "2",
    "TRIPTYCH_IDLE_TIMEOUT_S": "2",
}


def asking(text, **more):
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def request(body=b"", *headers, path=CHAT.path, method="POST"):
    body = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


HELLO = asking("Hello!")


class Gateway:
    def __init__(self, **settings):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "TRIPTYCH_"))}
        command = [sys.executable, "-m", "tests.scripted_gateway"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**clean, **SETTINGS, **settings})
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.process.kill()
        self.process.wait(HANG_S)
        self.process.stdout.close()

    def rss(self):
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)

    def serves_others(self):
        response = httpx.post(self.url + CHAT.path, json=HELLO, timeout=HANG_S)
        assert (response.status_code, response.json()["choices"][0]["message"]["content"]) == (200, "Hello")

    def raw(self, *parts):
        """The bytes that come back for these, until the server closes; a server that resets has said what it had."""
        with self.connect() as connection:
            sender = threading.Thread(target=send_all, args=(connection, parts), daemon=True)
            sender.start()
            try:
                return read_all(connection)
            finally:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                sender.join(HANG_S)
                assert not sender.is_alive()

    def sample(self, name):
        for line in httpx.get(self.url + "/metrics", timeout=HANG_S).text.splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rpartition(" ")[2])
        return 0.0


def send_all(connection, parts):
    with contextlib.suppress(OSError):
        for part in parts:
            connection.sendall(part)


def read_all(connection):
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def read_answer(connection):
    """One response with a content-length, off a connection that may be kept."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def refusal(response):
    """The status and the code of what one response says; the OpenAI error object is all of its body."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head
    error = orjson.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"].split()) > 3
    return int(head.split()[1]), error["code"]


def wait_for(condition):
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def module_gateway():
    running = Gateway()
    try:
        for _ in range(20):  # what the first requests import and allocate is not a fault's
            running.serves_others()
        yield running
    finally:
        running.stop()


@pytest.fixture
def gateway(module_gateway):
    """Whatever a test does, the gateway lives on, serves, and has grown by no more than the allocator keeps."""
    before = module_gateway.rss()
    yield module_gateway
    assert module_gateway.process.poll() is None
    module_gateway.serves_others()
    assert module_gateway.rss() - before < 16 * MB


def trickle(connection, byte, seconds=0.1):
    """Sends it again and again until the server has had enough."""

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(byte)
                time.sleep(seconds)

    threading.Thread(target=run, daemon=True).start()


# Slow clients.


@pytest.mark.parametrize("beginning", [b"P", b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: "])
def test_slow_headers(gateway, beginning):
    with gateway.connect() as connection:
        connection.sendall(beginning)
        trickle(connection, b"A" if beginning == b"P" else b"a")
        gateway.serves_others()
        assert refusal(read_all(connection)) in [(408, "request_timeout"), (400, "invalid_request")]


def test_headers_that_never_end(gateway):
    with gateway.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\n")
        gateway.serves_others()
        assert refusal(read_all(connection)) == (408, "request_timeout")


@pytest.mark.parametrize("byte", [b"", b"\r\n"])
def test_a_connection_without_a_request(gateway, byte):
    with gateway.connect() as connection:
        if byte:
            trickle(connection, byte)
        assert read_all(connection) == b""


@pytest.mark.parametrize("framing", ["content-length: 1000", "transfer-encoding: chunked"])
def test_a_slow_body(gateway, framing):
    with gateway.connect() as connection:
        connection.sendall(request(b"", framing))
        trickle(connection, b"1\r\na\r\n" if "chunked" in framing else b"a")
        gateway.serves_others()
        assert refusal(read_all(connection)) == (408, "request_timeout")


def test_a_slow_body_of_what_was_answered(gateway):
    """Its answer does not wait for the body, nor does its end."""
    with gateway.connect() as connection:
        connection.sendall(request(b"", "content-length: 1000", path="/nope"))
        head, body = read_answer(connection)
        assert b" 404 " in head
        assert orjson.loads(body)["error"]["code"] == "unknown_url"
        trickle(connection, b"a")
        assert read_all(connection) == b""


def test_a_kept_connection_ends_when_it_is_idle(gateway):
    with gateway.connect() as connection:
        for _ in range(3):
            connection.sendall(request(HELLO))
            assert b" 200 " in read_answer(connection)[0]
        assert read_all(connection) == b""


def test_three_hundred_slow_clients(gateway):
    connections = [gateway.connect() for _ in range(300)]
    try:
        for connection in connections:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: ")
        gateway.serves_others()
        assert {refusal(read_all(connection)) for connection in connections} == {(408, "request_timeout")}
    finally:
        for connection in connections:
            connection.close()


# Too much.

FLOODS = {
    "many": request(b"", *(f"x-{number}: y" for number in range(100_000))),
    "one": request(b"", "x-long: " + "y" * 10 * MB),
    "name": request(b"", "x" * 10 * MB + ": y"),
    "path": request(b"", path="/" + "y" * 10 * MB),
    "endless": b"GET / HTTP/1.1\r\nx-endless: " + b"y" * 20 * MB,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_header_floods(gateway, flood):
    assert refusal(gateway.raw(FLOODS[flood])) == (431, "request_headers_too_large")


def test_the_most_headers(gateway):
    body = orjson.dumps(HELLO)
    most = [f"x-{number}: y" for number in range(MAX_HEADERS - 3)]  # beside host, connection and content-length
    assert b" 200 " in gateway.raw(request(body, "connection: close", *most)).partition(b"\r\n")[0]
    assert refusal(gateway.raw(request(body, "connection: close", "x-one: more", *most)))[0] == 431


def test_headers_in_many_pieces_are_counted_together():
    pieces = [f"x-{number}: {'y' * 1000}\r\n".encode() for number in range(MAX_HEADERS - 1)]
    gateway = Gateway(TRIPTYCH_HEADER_TIMEOUT_S=str(HANG_S))  # a busy machine is not to be taken for a slow client
    try:
        assert refusal(gateway.raw(b"GET / HTTP/1.1\r\n", *pieces)) == (431, "request_headers_too_large")
        # The first read counts too: all but a little was in it, and the rest was waited for.
        in_two = b"GET / HTTP/1.1\r\n" + b"".join(pieces[:40]), pieces[40]
        assert refusal(gateway.raw(*in_two)) == (431, "request_headers_too_large")
    finally:
        gateway.stop()


def test_an_announced_hundred_megabytes_are_refused_unread(gateway):
    with gateway.connect() as connection:
        connection.sendall(request(b"", f"content-length: {100 * MB}"))
        head, body = read_answer(connection)
        assert (b" 413 " in head, orjson.loads(body)["error"]["code"]) == (True, "request_too_large")
        assert read_all(connection) == b""  # it is not waited for


@pytest.mark.parametrize("framing", [f"content-length: {100 * MB}", "transfer-encoding: chunked"])
def test_a_hundred_megabytes_that_are_sent(gateway, framing):
    part = b"y" * MB
    part = b"%x\r\n%s\r\n" % (len(part), part) if "chunked" in framing else part
    before = gateway.rss()
    response = gateway.raw(request(b"", framing), *[part] * 100)
    assert refusal(response) == (413, "request_too_large")
    assert gateway.rss() - before < 4 * MB


def test_an_endless_body(gateway):
    def forever():
        while True:
            yield b"10000\r\n" + b"y" * 65536 + b"\r\n"

    assert refusal(gateway.raw(*[request(b"", "transfer-encoding: chunked")], *take(forever(), 20_000)))[0] == 413


def take(parts, number):
    return (part for part, _ in zip(parts, range(number), strict=False))


@pytest.mark.parametrize(
    "parts",
    [
        [b"5\r\nhello\r\n0\r\n", b"x-trailer: " + b"y" * 10 * MB],
        [b"5\r\nhello\r\n0\r\n", *[b"x-trailer: y\r\n"] * 10_000],
        [b"5;" + b"x" * 10 * MB],
        [b"1;" + b"x" * 1000 + b"\r\ny\r\n"] * 10_000,
    ],
    ids=["one trailer", "many trailers", "one extension", "many extensions"],
)
def test_floods_around_a_body(gateway, parts):
    assert refusal(gateway.raw(request(b"", "transfer-encoding: chunked"), *parts))[0] in (400, 431)


def test_a_body_that_comes_byte_by_byte_in_chunks(gateway):
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in orjson.dumps(asking("Hello!" * 3000)))
    with gateway.connect() as connection:
        connection.sendall(request(b"", "transfer-encoding: chunked"))
        for at in range(0, len(chunks), 10_000):
            connection.sendall(chunks[at : at + 10_000])
        connection.sendall(b"0\r\n\r\n")
        assert b" 200 " in read_answer(connection)[0]


def test_a_compressed_body_is_not_opened(gateway):
    bomb = gzip.compress(b" " * 500 * MB, 1)[: MB - 1]
    response = gateway.raw(request(bomb, "content-encoding: gzip", "connection: close"))
    assert refusal(response) == (415, "unsupported_content_encoding")
    assert b"accept-encoding: identity" in response


@pytest.mark.parametrize("depth", [100, 500, 900, 1000, 100_000, 500_000])
@pytest.mark.parametrize("key", ["messages", "metadata", "tools", "response_format", "unknown", "content", "schema"])
def test_deep_json(gateway, key, depth):
    deep = b"[" * depth + b"]" * depth
    nested = b'{"a":' * min(depth, 100_000) + b"1" + b"}" * min(depth, 100_000)
    values = {
        "messages": b'"messages":' + deep,
        "content": b'"messages":[{"role":"user","content":' + deep + b"}]",
        "schema": b'"messages":[],"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":'
        + nested
        + b"}}",
        "tools": b'"messages":[],"tools":[{"type":"function","function":{"name":"a","parameters":' + nested + b"}}]",
    }
    body = b'{"model":"echo",' + values.get(key, b'"%s":%s' % (key.encode(), deep)) + b"}"
    status, code = refusal(gateway.raw(request(body, "connection: close")))
    assert (status, code) in [
        (400, "invalid_request"),
        (400, "unsupported_parameter"),
        (413, "request_too_large"),
    ]


# Not HTTP, or too much of it at once.


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,  # TLS where there is none
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"\0" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_garbage(gateway, garbage):
    assert refusal(gateway.raw(garbage)) == (400, "invalid_request")


@pytest.mark.parametrize("stream", [False, True])
def test_garbage_behind_a_request_does_not_touch_its_answer(gateway, stream):
    response = gateway.raw(request(asking("slowly", stream=stream)), b"\0garbage\r\n\r\n" * 1000)
    answer, begin, rest = response.rpartition(b"HTTP/1.1 400")
    assert refusal(begin + rest) == (400, "invalid_request")
    if stream:
        assert unchunk(answer)[0].endswith(b"data: [DONE]\n\n")
    else:
        assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == "Hello"


def test_a_broken_body_behind_a_request(gateway):
    response = gateway.raw(
        request(asking("slowly")), request(b"", "transfer-encoding: chunked"), b"5\r\nhello\r\nnot a size\r\n"
    )
    answer, begin, rest = response.rpartition(b"HTTP/1.1 400")
    assert refusal(begin + rest) == (400, "invalid_request")
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == "Hello"


def test_requests_sent_ahead_are_few(gateway):
    before = gateway.rss()
    response = gateway.raw(request(asking("slowly")), request(b"", path="/nope", method="GET") * 20_000)
    assert gateway.rss() - before < 6 * MB
    *answers, last = response.split(b"HTTP/1.1 ")[1:]
    assert answers[0].startswith(b"200 ")
    assert {answer[:3] for answer in answers[1:]} == {b"404"}
    assert len(answers) == MAX_AHEAD + 1
    assert refusal(b"HTTP/1.1 " + last) == (429, "overloaded")


@pytest.mark.parametrize("to", ["websocket", "h2c", "x"])
@pytest.mark.parametrize("pieces", [1, 2, 200])
def test_an_upgrade_is_declined_and_the_request_answered(gateway, to, pieces):
    """Its body too: Java's client asks for h2c with every request, and curl --http2 does."""
    asks = request(HELLO, "connection: Upgrade, HTTP2-Settings", f"upgrade: {to}", "http2-settings: AAMAAABkAARAAAAA")
    with gateway.connect() as connection:
        for _ in range(2):
            for at in range(0, len(asks), len(asks) // pieces):
                connection.sendall(asks[at : at + len(asks) // pieces])
            head, body = read_answer(connection)
            assert (head[:13], orjson.loads(body)["choices"][0]["message"]["content"]) == (b"HTTP/1.1 200 ", "Hello")


def test_upgrades_sent_ahead(gateway):
    asks = request(HELLO, "connection: upgrade", "upgrade: h2c")
    response = gateway.raw(asks * 3, request(HELLO, "connection: upgrade, close", "upgrade: h2c"))
    assert response.count(b"HTTP/1.1 200 ") == response.count(b'"content":"Hello"') == 4


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=strategies.data())
def test_what_is_sent_is_what_counts_and_not_its_pieces(module_gateway, data):
    """Requests of every kind, in any pieces, are answered as they are in one."""
    kinds = strategies.lists(strategies.sampled_from(sorted(KINDS)), min_size=1, max_size=6)
    sent = b"".join(KINDS[kind] for kind in data.draw(kinds, "requests")) + LAST
    cuts = data.draw(strategies.lists(strategies.integers(0, len(sent)), max_size=12), "cuts")
    pieces = [sent[begin:end] for begin, end in itertools.pairwise([0, *sorted(cuts), len(sent)])]
    assert statuses(module_gateway.raw(*pieces)) == statuses(module_gateway.raw(sent))


def statuses(response):
    found = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", response)
    assert found
    return found


LAST = request(HELLO, "connection: close")
KINDS = {
    "chat": request(HELLO),
    "stream": request(asking("Hello!", stream=True)),
    "chunks": request(b"5\r\nhello\r\n0\r\nx-trailer: 1\r\n\r\n", "transfer-encoding: chunked"),
    "upgrade": request(HELLO, "connection: upgrade", "upgrade: h2c"),
    "bad json": request(b"{"),
    "unknown": request(b"", path="/nope", method="GET"),
    "unread": request(b"y" * 5000, path="/nope"),
    "blank lines": b"\r\n\r\n",
    "broken": b"\0\r\n\r\n",
    "broken chunks": request(b"zz\r\n", "transfer-encoding: chunked"),
    "broken head": b"GET / HTTP/1.1\r\nx y: z\r\n\r\n",
    "large head": request(b"", "x-large: " + "y" * 40_000),
}


# Connections.


def test_idle_connections_make_room():
    gateway = Gateway(TRIPTYCH_MAX_CONNECTIONS="20", TRIPTYCH_HEADER_TIMEOUT_S="60", TRIPTYCH_IDLE_TIMEOUT_S="60")
    idle = []
    try:
        busy = gateway.connect()
        busy.sendall(request(asking("slowly", stream=True), "connection: close"))
        idle = [gateway.connect() for _ in range(100)]
        gateway.serves_others()
        assert read_all(idle[0]) == b""  # the longest idle goes first
        idle[-1].sendall(request(HELLO))
        assert b" 200 " in read_answer(idle[-1])[0]
        assert read_all(busy).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")  # and none that has a request
        assert gateway.sample('triptych_connections_ended_total{reason="idle"}') >= 80
    finally:
        for connection in idle:
            connection.close()
        gateway.stop()


def test_one_more_than_all_busy_connections():
    gateway = Gateway(TRIPTYCH_MAX_CONNECTIONS="5")
    busy = [gateway.connect() for _ in range(5)]
    try:
        for connection in busy:
            connection.sendall(request(asking("never", stream=True)))
            assert b" 200 " in connection.recv(65536)
        with gateway.connect() as connection:
            assert refusal(read_all(connection)) == (503, "overloaded")
        busy.pop().close()
        wait_for(lambda: gateway.process.poll() is None and len(busy) == 4)
        gateway.serves_others()
    finally:
        for connection in busy:
            connection.close()
        gateway.stop()


# Clients that do not read, and those that leave.

NOT_READING = 'triptych_connections_ended_total{reason="not_reading"}'
IN_FLIGHT = 'triptych_requests_in_flight{pipeline="echo"}'


def test_two_hundred_clients_that_do_not_read():
    gateway = Gateway()
    try:
        gateway.serves_others()
        before = gateway.rss()
        most = do_not_read(gateway, 200)
        assert (most - before) / 200 < 256 * 1024
        for _ in range(2):  # the allocator keeps what it had, and gives it to the next: nothing is added
            assert do_not_read(gateway, 200) - most < 4 * MB
    finally:
        gateway.stop()


def do_not_read(gateway, clients):
    """So many ask for an endless stream; others are served until all of them were ended. Answers the most memory."""
    ended = gateway.sample(NOT_READING) + clients
    connections, most = [], 0
    try:
        for _ in range(clients):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", gateway.port))
            connection.sendall(request(asking("forever", stream=True)))
            connections.append(connection)
        deadline = time.monotonic() + HANG_S
        while gateway.sample(NOT_READING) < ended:
            assert time.monotonic() < deadline, "they were not ended"
            gateway.serves_others()
            most = max(most, gateway.rss())
        wait_for(lambda: gateway.sample(IN_FLIGHT) == 0)
        return most
    finally:
        for connection in connections:
            connection.close()


def test_a_client_that_reads_slowly_is_served_on(gateway):
    """As long as it reads at all."""
    with gateway.connect() as connection:
        connection.sendall(request(asking("forever", stream=True)))
        began = time.monotonic()
        while time.monotonic() - began < 2 * int(SETTINGS["TRIPTYCH_WRITE_TIMEOUT_S"]):
            assert connection.recv(MB)
            time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_end_is_not_read(stream):
    """The pipeline has said all of it, so nothing of a stream runs any more; still the connection does not stay."""
    gateway = Gateway()
    try:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", gateway.port))
            connection.sendall(request(asking("plenty", stream=stream)))
            wait_for(lambda: gateway.sample(NOT_READING) == 1)
            gateway.serves_others()
    finally:
        gateway.stop()


@pytest.mark.parametrize(("text", "stream"), [("never", False), ("never", True), ("forever", True)])
def test_clients_that_leave(gateway, text, stream):
    connections = [gateway.connect() for _ in range(20)]
    for connection in connections:
        connection.sendall(request(asking(text, stream=stream)))
    wait_for(lambda: gateway.sample(IN_FLIGHT) == 20)
    for connection in connections:
        connection.close()
    wait_for(lambda: gateway.sample(IN_FLIGHT) == 0)


@pytest.mark.parametrize("ahead", [request(HELLO), request(HELLO) * 3, request(b"y" * 500_000, path="/nope")])
def test_a_client_that_leaves_with_requests_sent_ahead(gateway, ahead):
    """Nothing is read of it then, and still its leaving is seen."""
    with gateway.connect() as connection:
        connection.sendall(request(asking("never")) + ahead)
        wait_for(lambda: gateway.sample(IN_FLIGHT) == 1)
    wait_for(lambda: gateway.sample(IN_FLIGHT) == 0)


def test_requests_sent_ahead_wait_as_long_as_they_must(gateway):
    """Longer than a client may take for its headers: it is the server that does not read them."""
    with gateway.connect() as connection:
        connection.sendall(request(asking("slowly")) * 3 + request(HELLO, "connection: close")[:-5])
        time.sleep(0.1)
        connection.sendall(request(HELLO, "connection: close")[-5:])
        assert read_all(connection).count(b"HTTP/1.1 200 ") == 4
