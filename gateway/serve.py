"""`triptych serve`: pull what is missing, start Triton, start the gateway, and end both, whatever ends first.

The order of ending matters: the gateway stops taking requests and drains, its lanes close, then Triton stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence

import uvicorn
import uvloop
from starlette.applications import Starlette

from gateway import listener
from gateway.app import create_app
from gateway.backend import Backend
from gateway.greeting import greeting
from gateway.kept import Kept
from gateway.keys import Keys, forget_secrets
from gateway.lane import Lanes
from gateway.ratelimit import Limits
from gateway.settings import Settings
from gateway.supervisor import Supervisor
from gateway.triton import Triton, TritonError, port_is_free
from observability import logs
from observability.keeping import Traces
from observability.triton_log import Follower
from pipelines.contracts import MODELS, model_name
from pipelines.pipeline import Pipeline, cache_dir
from pipelines.repository import prepare
from pipelines.sources import is_pulled

log = logging.getLogger(__name__)

LOAD_S = 300
DRAIN_S = 20


def serve(settings: Settings, pipelines: Sequence[Pipeline]) -> int:
    """Until SIGINT or SIGTERM; answers the exit code."""
    keys = set_up(settings, pipelines)
    triton = _triton(settings, pipelines)
    log_lines = Follower(triton.log_file)
    kept = Kept(settings)
    # Until uvicorn takes the signals over, one of them is an exit like any other: Triton is stopped on the way out.
    previous = {number: signal.signal(number, _exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        log_lines.start()
        triton.start()
        print(f"starting Triton on 127.0.0.1:{triton.grpc_port} (gRPC) and :{triton.http_port} (HTTP)", file=sys.stderr)
        triton.wait_ready(LOAD_S, lambda model: print(f"  {model} is ready", file=sys.stderr))
        return uvloop.run(_gateway(settings, keys, pipelines, triton, kept.traces))
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave a server behind
        triton.stop()
        log_lines.stop()
        kept.close()  # the last spans are those of stages that were stopped


def set_up(settings: Settings, pipelines: Sequence[Pipeline]) -> Keys:
    """What a gateway needs before anything runs, whoever runs its Triton."""
    logs.configure(settings.log_level, settings.log_format, source="gateway")
    keys = Keys.from_env(limits=Limits(settings.key_requests_per_minute, settings.key_concurrency))
    forget_secrets(os.environ)
    listener.check_tls(settings)
    listener.warn_if_open(settings, keys_required=keys.required)
    listener.raise_file_limit(settings)
    if not port_is_free(settings.port, settings.host):
        raise TritonError(f"port {settings.port} is in use: choose another with --port (make serve: PORT=…)")
    for pipeline in pipelines:
        _pull(pipeline)
    return keys


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _pull(pipeline: Pipeline) -> None:
    """In a process of its own: a first pull may convert a tokenizer, and that imports transformers."""
    if (
        not is_pulled(pipeline)
        and subprocess.run([sys.executable, "-m", "pipelines.sources", pipeline.name]).returncode
    ):
        raise SystemExit(1)  # it has said why


def _triton(settings: Settings, pipelines: Sequence[Pipeline]) -> Triton:
    port = int(settings.triton_grpc.rpartition(":")[2])
    folder = cache_dir() / "model_repository" / str(port)  # of this server alone: another may serve others
    repositories = prepare(pipelines, folder)
    # Loading an ensemble loads its members; the orchestrator comes after them, since it calls them.
    load = [model_name(pipeline.name, model) for model in ("ensemble", "orchestrator") for pipeline in pipelines]
    models = [model_name(pipeline.name, model) for model in MODELS for pipeline in pipelines]
    log_file = cache_dir() / "logs" / f"triton-{port}.log"
    log_file.unlink(missing_ok=True)
    return Triton(repositories, load, models, grpc_port=port, log_file=log_file)


class _Server(uvicorn.Server):
    """uvicorn raises the signal that ended it again when it has drained; here the exit code says how it went."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _gateway(
    settings: Settings, keys: Keys, pipelines: Sequence[Pipeline], triton: Triton, traces: Traces | None
) -> int:
    served = {pipeline.name: pipeline for pipeline in pipelines}
    lanes = Lanes(settings.triton_grpc, served, accept_timeout_s=settings.accept_timeout_s)

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with lanes:
            supervisor = asyncio.create_task(Supervisor(triton, lanes, pipelines).run(), name="supervisor")
            yield
            supervisor.cancel()  # stubs that end from here on are meant to
            await asyncio.wait([supervisor])

    app = create_app(lanes, settings, lifespan, keys, traces)
    return await listen(app, settings, keys, pipelines, lanes)


async def listen(
    app: Starlette, settings: Settings, keys: Keys, pipelines: Sequence[Pipeline], backend: Backend
) -> int:
    """Serves the app until a signal, and says once everything in it answers."""
    server = _Server(listener.configure(app, settings, timeout_graceful_shutdown=DRAIN_S))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    greeter = asyncio.create_task(_greet(server, settings, keys, pipelines, backend))
    try:
        await server.serve()
    finally:
        greeter.cancel()
    return 0


async def _greet(
    server: uvicorn.Server, settings: Settings, keys: Keys, pipelines: Sequence[Pipeline], backend: Backend
) -> None:
    """Say so once everything answers."""
    while not (server.started and all(backend.ready(pipeline.name) for pipeline in pipelines)):
        await asyncio.sleep(0.05)
    print(greeting(settings.url, pipelines, keyed=keys.required), flush=True)
