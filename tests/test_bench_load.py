"""The load client counts what arrived, and names what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from bench import bare_sse, endurance, load, processes
from bench.client import Client, Endpoint, Result
from bench.report import json_line, median, milliseconds, percentile, table

CHUNK = 'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = 'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'
DONE = "data: [DONE]\n\n"
SSE = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*parts: str) -> list[bytes]:
    """An SSE response in the pieces it is sent in; None of the parts is the end."""
    pieces = [f"{len(part.encode()):x}\r\n{part}\r\n".encode() for part in parts]
    return [SSE.encode(), *pieces, b"0\r\n\r\n"]


@contextlib.contextmanager
def serve(*answers: list[bytes], pause: float = 0.0, close: bool = False) -> Iterator[str]:
    """A scripted server: each request, on any connection, gets the next answer, piece by piece."""
    listener = socket.create_server(("127.0.0.1", 0))
    remaining = iter(answers)

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                for piece in next(remaining, []):
                    connection.sendall(piece)
                    time.sleep(pause)
                if close:
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # a blocked accept would keep it open
        listener.close()


def post(url: str, times: int = 1, **options: object) -> list[Result]:
    async def run() -> list[Result]:
        client = Client(Endpoint(url))
        results = [await client.post("/chat/completions", {"model": "m"}, **options) for _ in range(times)]
        client.close()
        return results

    return asyncio.run(run())


def test_a_stream_is_counted_with_its_usage_and_finish_reason():
    role = 'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    with serve(chunked(": a comment\n\n", role, CHUNK, CHUNK + CHUNK, LAST, USAGE, DONE), pause=0.01) as url:
        (result,) = post(url)
    assert (result.error, result.status, result.events, result.finish_reason) == (None, 200, 3, "stop")
    assert (result.tokens, result.prompt_tokens) == (7, 3)
    assert len(result.gaps) + result.together == 2
    assert result.started < result.first < result.last < result.ended


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_events_may_be_cut_anywhere_and_lines_may_end_in_crlf(size):
    events = (CHUNK * 5 + LAST + DONE).replace("\n", "\r\n" if size % 2 else "\n")
    with serve(chunked(*(events[at : at + size] for at in range(0, len(events), size)))) as url:
        (result,) = post(url)
    assert (result.error, result.events, result.finish_reason) == (None, 5, "stop")


def test_text_that_looks_like_keys_is_not_counted():
    tricky = {"choices": [{"delta": {"content": '"content":"x"\n\ndata: "finish_reason":"'}, "finish_reason": None}]}
    spaced = f"data: {json.dumps(tricky)}\n\n"
    tight = f"data: {json.dumps(tricky, separators=(',', ':'))}\n\n"
    with serve(chunked(spaced, tight, LAST, DONE)) as url:
        (result,) = post(url)
    assert (result.events, result.finish_reason) == (2, "stop")


def test_a_completion_without_a_stream():
    choice = b'{"message":{"content":"hello"},"finish_reason":"length"}'
    body = b'{"choices":[%s],"usage":{"completion_tokens":2}}' % choice
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with serve([answer], [answer]) as url:
        first, second = post(url, times=2)
    assert (first.error, first.tokens, first.finish_reason) == (None, 2, "length")
    assert second.error is None


def test_a_kept_connection_that_the_server_closed_is_opened_again():
    answer = chunked(CHUNK, LAST, DONE)
    with serve(answer, answer, answer, close=True) as url:
        results = post(url, times=3)
    assert [result.error for result in results] == [None, None, None]
    assert [result.events for result in results] == [1, 1, 1]


def test_a_refusal_keeps_its_connection():
    """As every client does: a new one for each costs the server as much as the refusal."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept_one() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            while connection.recv(65536):
                connection.sendall(b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}")

    threading.Thread(target=accept_one, daemon=True).start()
    results = post(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", times=3)
    assert [(result.error, result.headers["retry-after"]) for result in results] == [("http 429", "7")] * 3


def test_text_is_kept_and_headers_are_sent_where_it_is_asked_for():
    with serve(chunked(CHUNK, CHUNK + LAST, DONE), chunked(CHUNK, DONE)) as url:
        (result,) = post(url, keep_text=True)
        assert (result.text, result.done) == (["a", "a"], True)
        assert post(url)[0].text is None
    assert b"\r\nx-request-timeout-ms: 5\r\n" in Endpoint(url).request("/", {}, {"x-request-timeout-ms": "5"})


def test_done_after_an_error_is_seen():
    with serve(chunked('data: {"error":{"message":"no","code":"unavailable"}}\n\n', DONE)) as url:
        (result,) = post(url)
    assert (result.error, result.done) == ("error event: unavailable", True)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"], "http 503"),
        (chunked(CHUNK, LAST), "no [DONE]"),
        (chunked(CHUNK, LAST)[:-1], "closed early"),
        (
            chunked(CHUNK, 'data: {"error":{"message":"no","code":"overloaded"}}\n\n'),
            "error event: overloaded",
        ),
        (chunked(CHUNK, "data: {oops\n\n", DONE), "bad event"),
        (chunked("data: 5\n\n", DONE), "bad event"),
        ([b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{"], "bad body"),
        ([b"SMTP ready\r\n"], "http: HttpParserInvalidStatusError"),
    ],
)
def test_every_failure_has_a_kind(answer, error):
    with serve(answer, close=True) as url:
        (result,) = post(url)
    assert result.error is not None
    assert result.error == error or (error.startswith("http: ") and result.error.startswith("http: "))


def test_a_server_that_stalls_is_a_timeout_and_one_that_is_away_a_connect_error():
    with serve(chunked(CHUNK)[:-1], pause=0.5) as url:
        (result,) = post(url, timeout=0.2)
    assert result.error == "timeout"
    (result,) = post(url)
    assert result.error == "connect: ConnectionRefusedError"


def test_a_client_may_leave():
    with serve(chunked(*[CHUNK] * 50, LAST, DONE), pause=0.01) as url:
        (result,) = post(url, leave_after=3)
    assert result.error is None
    assert 3 <= result.events < 50
    assert result.finish_reason is None


def test_a_url_that_is_none_is_refused():
    for url in ("ftp://x", "127.0.0.1:80", "http://"):
        with pytest.raises(ValueError, match="the URL must be"):
            Endpoint(url)
    request = Endpoint("http://[::1]:8080/v1/", "key").request("/models", {})
    assert request.startswith(b"POST /v1/models HTTP/1.1\r\nHost: [::1]:8080\r\n")
    assert b"Authorization: Bearer key\r\n" in request


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(bare_sse.app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_load_on_the_bare_server_prints_a_table_and_one_json_line(capsys):
    with bare_server() as url:
        for base in ("/v1", "/fair/v1"):
            arguments = ["--url", url + base, "--model", "m", "--concurrency", "4", "--requests", "8"]
            assert load.main([*arguments, "--max-tokens", "20"]) == 0
            *_, last = capsys.readouterr().out.strip().splitlines()
            found = json.loads(last)
            assert (found["succeeded"], found["events"], found["errors"]) == (8, 160, {})
            assert found["finish_reasons"] == {"length": 8}
            assert 0 < found["first_token_ms"]["p50"] <= found["first_token_ms"]["p99"]


def test_load_that_all_fails_says_so(capsys):
    with serve() as url:
        pass
    assert load.main(["--url", url, "--model", "m", "--requests", "3", "--no-stream", "--completions"]) == 1
    *_, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert found["errors"] == {"connect: ConnectionRefusedError": 3}
    assert found["first_token_ms"]["p50"] is None


def test_percentiles_are_by_nearest_rank_and_count_zeros():
    assert [percentile([3, 1, 2, 4], percent) for percent in (50, 90, 99)] == [2, 4, 4]
    assert percentile([5.0], 50, zeros=1) == 0
    assert percentile([5.0], 90, zeros=1) == 5
    assert math.isnan(percentile([], 50))
    assert (median([3, 1, 2]), median([4, 1, 2, 3])) == (2, 2.5)
    assert milliseconds([0.5]) == {"p50": 500, "p90": 500, "p99": 500}


def test_tables_line_up_and_json_has_no_nan():
    assert table(["a", "per s"], [["long name", 12345.6], ["b", math.nan]]).splitlines() == [
        "a           per s",
        "long name  12,346",
        "b               -",
    ]
    assert json_line({"a": [1.23456, math.nan], "b": {"c": 2}}) == '{"a":[1.235,null],"b":{"c":2}}'


def test_endurance_is_flat_only_if_nothing_grew_came_or_went():
    mib = 2**20
    warm = {"gateway (1)": 100 * mib, "stub (2)": 400 * mib, "/dev/shm": 64 * mib}

    def judged(**end: int) -> bool:
        samples = [(0.0, {"gateway (1)": 1}), (60.0, warm), (65.0, {}), (300.0, {**warm, **end})]
        return endurance.verdict(samples)["flat"]

    assert judged()
    assert judged(**{"gateway (1)": 108 * mib, "stub (2)": 420 * mib})  # 8 MiB, or 5 %
    assert not judged(**{"gateway (1)": 109 * mib})
    assert not judged(**{"stub (2)": 421 * mib})
    assert not judged(**{"new (3)": mib})
    gone = endurance.verdict([(0.0, warm), (60.0, warm), (120.0, {"/dev/shm": 0})])
    assert not gone["flat"]
    assert gone["memory"]["stub (2)"] == {"warm_mib": 400, "end_mib": None, "flat": False}


def test_a_process_is_ended_with_its_children_and_its_memory_is_seen(tmp_path):
    child = "import time; time.sleep(60)"
    parent = "import signal, subprocess, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
    parent += f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)\n"
    (tmp_path / "stubborn.py").write_text(parent)
    environ = {"PYTHONPATH": str(tmp_path)}
    with processes.running(["stubborn"], tmp_path / "log", environ, grace_s=0.3) as process:
        deadline = time.monotonic() + 10
        while len(family := processes.tree(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        sizes = processes.resident(family)
        assert len(sizes) == 2
        assert sizes[f"stubborn ({process.pid})"] > 2**20
        assert processes.shared_memory(family) == 0
    assert process.returncode == -9
    deadline = time.monotonic() + 5
    while processes.resident(family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.resident(family) == {}


def test_a_process_that_ends_instead_of_serving_says_why(tmp_path):
    log = tmp_path / "log"
    with processes.running(["no_such_module"], log) as process:
        with pytest.raises(processes.StartError, match="No module named no_such_module"):
            processes.wait_ready(process, "http://127.0.0.1:9/", log, 10)


def test_free_ports_are_free_and_in_a_row():
    first = processes.free_ports(3)
    for port in range(first, first + 3):
        socket.create_server(("127.0.0.1", port)).close()
