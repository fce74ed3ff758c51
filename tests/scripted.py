"""The gateway over real sockets, and a backend that plays scripts: for what is told to clients, without Triton."""

import asyncio
import socket
import threading
import time
from collections import deque

import httpx
import openai
import orjson
import uvicorn

from gateway import listener
from gateway.app import create_app
from gateway.backend import Delta
from gateway.protocol import CHAT, COMPLETION
from observability import metrics
from pipelines.pipeline import Pipeline

MODEL = "echo"
CHAT_PATH, COMPLETION_PATH = CHAT.path, COMPLETION.path
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
PROMPT = {"model": MODEL, "prompt": "Hello!"}
ACCEPTED = Delta([], prompt_tokens=3)
ANSWER = [
    ACCEPTED,
    Delta([" He"]),
    Delta(["llo"]),
    Delta([" you"], "stop", 3, 4, {"preprocess": 1.5, "generate": 20}, cached_tokens=2),
]
FOREVER = 3600.0


class ScriptedStream:
    """Plays its steps: a Delta is told, an exception raised, a number slept."""

    def __init__(self, steps):
        self.steps = deque(steps)
        self.cancelled = threading.Event()
        self.cancelled_at = 0.0

    async def next(self):
        while True:
            step = self.steps.popleft()
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, Delta):
                return step
            await asyncio.sleep(step)

    def cancel(self):
        if not self.cancelled_at:
            self.cancelled_at = time.monotonic()
            self.cancelled.set()


class ScriptedBackend:
    def __init__(self):
        self.served = {name: Pipeline(name=name, source="path:none") for name in (MODEL, "other")}
        self.reset()

    def reset(self):
        self.steps = ANSWER
        self.each = []  # the steps of the next streams, if they differ
        self.submissions = []
        self.streams = []
        self.not_ready = set()
        self.recordings = {}
        self.refusal = None

    def pipelines(self):
        return self.served

    def ready(self, pipeline):
        return pipeline not in self.not_ready

    async def submit(self, submission):
        if self.refusal:
            raise self.refusal
        self.submissions.append(submission)
        stream = ScriptedStream(self.each.pop(0) if self.each else self.steps)
        self.streams.append(stream)
        return stream

    async def recording(self, pipeline, span):
        return self.recordings.get((pipeline, span), b"")


class Server:
    def __init__(self, backend, settings, lifespan=None, keys=None):
        self.backend = backend
        app = create_app(backend, settings, lifespan, keys)
        self.uvicorn = uvicorn.Server(listener.configure(app, settings, log_level="critical", lifespan="on"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *args):
        self.uvicorn.should_exit = True
        self.thread.join(5)
        assert not self.thread.is_alive()

    def post(self, path, body, **headers):
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        return httpx.post(self.url + path, content=content, headers=headers, timeout=5)

    def get(self, path):
        return httpx.get(self.url + path, timeout=5)

    def raw(self, *requests):
        """The bytes that come back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"".join(requests))
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def open(self, path, body):
        """A connection that has sent its request and read nothing."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(raw_request(path, body))
        return connection

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=5)


def wait_for(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def raw_request(path, body, *headers):
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def unchunk(response):
    """The body of a chunked response, and each chunk."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    chunks = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
        if not chunks[-1]:
            assert rest == b""
            return b"".join(chunks), chunks[:-1]


def sample(name, **labels):
    return metrics.REGISTRY.get_sample_value(name, labels) or 0
