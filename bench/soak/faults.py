"""Does to a running product what the plan says. Knows processes and sockets; not how the product mends itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from bench import processes
from bench.client import Client, Endpoint
from bench.echoes import Served
from bench.soak.asks import Echo
from bench.soak.plan import DEAF, HOSTILE, LEAVERS, STOP, TRITON, Fault

CLIENTS = 40  # of a burst
_PATIENCE_S = 20.0
_MB = 2**20


class Faults:
    """`strike`, then `carry_on`; what went otherwise than it should is in `problems`."""

    def __init__(self, served: Served, echoes: Sequence[Echo], write_timeout_s: float, seed: int) -> None:
        self.problems: list[str] = []
        self._served = served
        self._echoes = echoes
        self._write_timeout_s = write_timeout_s
        self._dice = random.Random(f"{seed} clients")
        self._open: dict[Fault, int] = {}  # descriptors of processes (pidfd): no pid that somebody else has by now

    def strike(self, fault: Fault) -> bool:
        """The signal, of faults that `breaks`; False if its process is gone already, and not yet replaced."""
        name = "tritonserver" if fault.kind == TRITON else f"stub {fault.pipeline}-{fault.stage}"
        for pid in processes.tree(self._served.pid):
            if processes.process_name(pid) == name:
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    self._open[fault] = descriptor
                    signal.pidfd_send_signal(descriptor, signal.SIGSTOP if fault.kind == STOP else signal.SIGKILL)
                    return True
        return False

    async def carry_on(self, fault: Fault) -> None:
        """What a fault is beside its signal."""
        if fault.resumed_after is not None:
            await asyncio.sleep(fault.resumed_after)
            self.resume(fault)
        elif not fault.breaks:
            await {LEAVERS: self._leavers, DEAF: self._deaf, HOSTILE: self._hostile}[fault.kind]()

    def resume(self, fault: Fault) -> bool:
        """Let a stopped process go on; answers whether it was still there."""
        try:
            signal.pidfd_send_signal(self._open[fault], signal.SIGCONT)
        except ProcessLookupError:
            return False
        return True

    def forget(self, fault: Fault) -> None:
        if (descriptor := self._open.pop(fault, None)) is not None:
            os.close(descriptor)

    async def _leavers(self) -> None:
        """All at once; each after a few events."""

        async def leave(number: int) -> None:
            client = Client(Endpoint(self._served.url + "/v1"))
            echo = self._echoes[number % len(self._echoes)]
            body = {"model": echo.name, "prompt": "stay a while", "max_tokens": 5000, "stream": True}
            await client.post("/completions", body, timeout=_PATIENCE_S, leave_after=self._dice.randint(1, 8))

        await asyncio.gather(*(leave(number) for number in range(CLIENTS)))

    async def _deaf(self) -> None:
        """Each asks for much and reads nothing, until the gateway must have closed it."""
        request = Endpoint(self._served.url + "/v1").request
        connections = []
        try:
            for number in range(CLIENTS):
                echo = self._echoes[number % len(self._echoes)]
                body = {"model": echo.name, "prompt": "who is there", "max_tokens": 20_000, "stream": True}
                connection = socket.socket()
                connections.append(connection)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, self._address)
                await asyncio.get_running_loop().sock_sendall(connection, request("/completions", body))
            await asyncio.sleep(self._write_timeout_s + 5)
        finally:
            for connection in connections:
                connection.close()

    async def _hostile(self) -> None:
        for name, (pieces, wanted) in hostile_requests().items():
            answer = await self._refused(pieces)
            if answer not in wanted:
                self.problems.append(f"{name}: answered {answer or 'nothing'} instead of {' or '.join(wanted)}")

    async def _refused(self, pieces: Sequence[bytes]) -> str:
        """The status that is answered, which may come before all of the request is sent."""
        reader, writer = await asyncio.open_connection(*self._address)

        async def send() -> None:
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            except ConnectionError:
                pass  # it was refused and closed: what counts is what was answered

        sending = asyncio.create_task(send())
        try:
            line = await asyncio.wait_for(reader.readline(), _PATIENCE_S)
            return line.split(b" ")[1].decode() if line.count(b" ") else ""
        except (OSError, asyncio.TimeoutError):
            return ""
        finally:
            sending.cancel()
            writer.close()

    @property
    def _address(self) -> tuple[str, int]:
        parts = urlsplit(self._served.url)
        return parts.hostname or "", parts.port or 0


def hostile_requests() -> dict[str, tuple[Sequence[bytes], Sequence[str]]]:
    """By name: the pieces to send, and which statuses refuse them rightly."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    deep = b'{"model": "x", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    whole = b"Content-Length: %d\r\n\r\n"
    part = b"%x\r\n%s\r\n" % (_MB, b"y" * _MB)
    return {
        "many headers": ([head + b"x-a: y\r\n" * 5000 + b"\r\n"], ("431",)),
        "a large header": ([head + b"x-a: " + b"y" * _MB + b"\r\n\r\n"], ("431",)),
        "deep JSON": ([head + whole % len(deep), deep], ("400",)),
        "an announced 100 MB": ([head + whole % (100 * _MB)], ("413",)),
        "100 MB that are sent": ([head + b"Transfer-Encoding: chunked\r\n\r\n", *[part] * 100], ("413",)),
        "a compressed body": ([head + b"Content-Encoding: gzip\r\n" + whole % 4, b"\x1f\x8b\x08\x00"], ("415",)),
        "garbage": ([b"\0\x01\x02 garbage\r\n\r\n"], ("400",)),
    }
