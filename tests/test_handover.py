"""Spans reach the process that keeps them; where nobody takes them nobody waits, and all that is lost is counted."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from observability import handover, tracing
from observability.encoded import encode
from observability.handover import Receiver, Sender, socket_path
from observability.spans import SpanData
from tests.product import wait_for
from tests.spans import request, span


def send(sender: Sender, one: SpanData) -> None:
    sender.send(one.trace_id, one.service, one.sampled, encode(one))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


class Taken:
    """What a receiver took."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, bool, bytes]] = []

    def __call__(self, *span) -> None:
        self.spans.append(span)


def test_spans_arrive_as_they_were_in_order(path):
    taken, sender = Taken(), Sender(path)
    receiver = Receiver(path, taken)
    for one in request():
        send(sender, one)
    sender.close()
    wait_for(lambda: len(taken.spans) == len(request()), 5)
    assert [encoded for *_, encoded in taken.spans] == [encode(one) for one in request()]
    assert [service for _, service, *_ in taken.spans] == [one.service for one in request()]
    assert {(trace_id, sampled) for trace_id, _, sampled, _ in taken.spans} == {(request()[0].trace_id, True)}
    assert sender.dropped == receiver.unreadable == 0
    receiver.close()
    assert not os.path.exists(path)


def test_many_are_several_datagrams(path):
    taken, sender = Taken(), Sender(path)
    receiver = Receiver(path, taken)
    big = span("a", 0, 1, attributes={"text": "x" * 5000})
    for _ in range(200):
        send(sender, big)
    wait_for(lambda: len(taken.spans) == 200, 10)
    sender.close()
    receiver.close()


def test_a_receiver_that_starts_anew_is_found(path):
    sender = Sender(path)
    send(sender, span("lost", 0, 1))
    wait_for(lambda: sender.dropped == 1, 5)
    for name in ("first", "second"):
        taken = Taken()
        receiver = Receiver(path, taken)
        send(sender, span(name, 0, 1))
        wait_for(lambda taken=taken: taken.spans, 5)
        receiver.close()
    sender.close()


def test_a_successors_socket_is_left_alone(path):
    first, taken = Receiver(path, Taken()), Taken()
    second = Receiver(path, taken)
    first.close()
    sender = Sender(path)
    send(sender, span("a", 0, 1))
    wait_for(lambda: taken.spans, 5)
    sender.close()
    second.close()


def test_one_that_does_not_read_holds_nobody_who_ends_a_span(path, monkeypatch):
    monkeypatch.setattr(handover, "_SEND_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(path)
        sender = Sender(path)
        big = span("a", 0, 1, attributes={"text": "x" * 20_000})
        slowest = 0.0
        for _ in range(6000):
            began = time.perf_counter()
            send(sender, big)
            slowest = max(slowest, time.perf_counter() - began)
        wait_for(lambda: sender.dropped >= 6000 - handover._MOST_WAITING, 10)
        assert slowest < 2  # a send of its own would wait for ever


def test_rubbish_is_counted_and_a_take_that_fails_is_not_the_end(path, caplog):
    taken: list[bytes] = []

    def take(trace_id: str, service: str, sampled: bool, encoded: bytes) -> None:
        if not taken:
            taken.append(b"")
            raise RuntimeError("no")
        taken.append(encoded)

    receiver = Receiver(path, take)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        encoded = encode(span("a", 0, 1))
        good = struct.pack(">cI", b"0", len(encoded)) + encoded
        bad = struct.pack(">cI", b"0", 3) + b"bad"
        out.sendto(b"service\n" + bad + good + good + good[:-1], path)
        wait_for(lambda: len(taken) == 2, 5)
        out.sendto(b"", path)
        out.sendto(b"service\n" + good, path)
        wait_for(lambda: len(taken) == 3, 5)
    assert receiver.unreadable == 2
    assert [record.message for record in caplog.records] == ["a span could not be kept"]
    receiver.close()


def test_a_stage_hands_over_what_is_not_sampled_too(path):
    taken = Taken()
    receiver = Receiver(path, taken)
    code = (
        "from observability import tracing\n"
        "import sys\n"
        "assert tracing.configure('triptych-generate') is False\n"
        "span = tracing.start('generate', parent='00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00')\n"
        "assert span.traceparent.endswith('-00') and not span.sampled\n"
        "tracing.record('queue', span, 1, 2)\n"
        "span.end()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**clean, tracing.SOCKET: path}, timeout=30)
    wait_for(lambda: len(taken.spans) == 2, 5)  # the exit sent what was waiting
    assert {(service, sampled) for _, service, sampled, _ in taken.spans} == {("triptych-generate", False)}
    receiver.close()


def test_the_socket_is_this_users_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = socket_path("traces", 8001)
    assert len(path) < 108
    receiver = Receiver(path, lambda *span: None)
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    receiver.close()
    os.chmod(os.path.dirname(path), 0o777)
    with pytest.raises(PermissionError, match="this user alone"):
        socket_path("traces", 8001)
    assert not [thread for thread in threading.enumerate() if thread.name == "trace-receiver"]
