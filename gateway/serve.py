"""`triptych serve`: pull what is missing, start Triton, start the gateway, and end both, whatever ends first.

The order of ending matters: the gateway stops taking requests and drains, its lanes close, then Triton stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence

import tritonclient.grpc
import uvicorn
import uvloop

from gateway.app import create_app
from gateway.lane import Lanes
from gateway.settings import Settings
from gateway.supervisor import Supervisor
from gateway.triton import Triton, TritonError, port_is_free
from observability import logs, tracing
from pipelines.contracts import MODELS, model_name
from pipelines.pipeline import Pipeline, cache_dir
from pipelines.repository import CHECKED_IN, render, repository_of
from pipelines.sources import is_pulled

log = logging.getLogger(__name__)

LOAD_S = 300
DRAIN_S = 20


def serve(settings: Settings, pipelines: Sequence[Pipeline]) -> int:
    """Until SIGINT or SIGTERM; answers the exit code."""
    logs.configure()
    tracing.configure("triptych-gateway")
    if not port_is_free(settings.port, settings.host):
        raise TritonError(f"port {settings.port} is in use: choose another with --port (make serve: PORT=…)")
    for pipeline in pipelines:
        _pull(pipeline)
    triton = _triton(settings, pipelines)
    # Until uvicorn takes the signals over, one of them is an exit like any other: Triton is stopped on the way out.
    previous = {number: signal.signal(number, _exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        triton.start()
        _wait(triton, [model for pipeline in pipelines for model in model_names(pipeline)])
        return uvloop.run(_gateway(settings, pipelines, triton))
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave a server behind
        triton.stop()
        tracing.shutdown()


def model_names(pipeline: Pipeline) -> list[str]:
    return [model_name(pipeline.name, model) for model in MODELS]


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
    repositories = []
    for pipeline in pipelines:
        repository = repository_of(pipeline.name)
        if repository != CHECKED_IN:
            render(pipeline.name, repository)
        if repository not in repositories:
            repositories.append(repository)
    port = int(settings.triton_grpc.rpartition(":")[2])
    # Loading an ensemble loads its members; the orchestrator comes after them, since it calls them.
    models = [model_name(pipeline.name, model) for model in ("ensemble", "orchestrator") for pipeline in pipelines]
    return Triton(repositories, models, grpc_port=port, log_file=cache_dir() / "logs" / f"triton-{port}.log")


def _wait(triton: Triton, models: list[str]) -> None:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc_port}")

    def ready(model: str) -> bool:
        try:
            return bool(client.is_model_ready(model))
        except tritonclient.grpc.InferenceServerException:
            return False  # not listening yet

    print(f"starting Triton on 127.0.0.1:{triton.grpc_port} (gRPC) and :{triton.http_port} (HTTP)", file=sys.stderr)
    triton.wait_ready(models, ready, LOAD_S, lambda model: print(f"  {model} is ready", file=sys.stderr))
    client.close()


class _Server(uvicorn.Server):
    """uvicorn raises the signal that ended it again when it has drained; here the exit code says how it went."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _gateway(settings: Settings, pipelines: Sequence[Pipeline], triton: Triton) -> int:
    lanes = Lanes(settings.triton_grpc, {pipeline.name: pipeline for pipeline in pipelines})

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with lanes:
            supervisor = asyncio.create_task(Supervisor(triton, lanes, pipelines).run(), name="supervisor")
            yield
            supervisor.cancel()  # stubs that end from here on are meant to
            await asyncio.wait([supervisor])

    config = uvicorn.Config(
        create_app(lanes, settings, lifespan),
        host=settings.host,
        port=settings.port,
        http="httptools",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    watcher = asyncio.create_task(_announce(server, settings, pipelines, lanes, triton))
    try:
        await server.serve()
    finally:
        watcher.cancel()
    return 0 if triton.running() else 1


async def _announce(
    server: uvicorn.Server, settings: Settings, pipelines: Sequence[Pipeline], lanes: Lanes, triton: Triton
) -> None:
    """Say so once everything answers; then watch Triton, without which there is nothing to serve."""
    while not (server.started and all(lanes.ready(pipeline.name) for pipeline in pipelines)):
        await asyncio.sleep(0.05)
    print(_greeting(settings, pipelines[0].name), flush=True)
    while triton.running():
        await asyncio.sleep(0.5)
    log.error("tritonserver has stopped; its log: %s", triton.log_file)
    server.should_exit = True


def _greeting(settings: Settings, pipeline: str) -> str:
    chat = f'{{"model": "{pipeline}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
    return (
        f"\nTriptych serves {pipeline} on http://{settings.host}:{settings.port}. Try:\n\n"
        f"curl http://{settings.host}:{settings.port}/v1/chat/completions"
        f" -H 'content-type: application/json' -d '{chat}'\n"
    )
