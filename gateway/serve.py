"""`triptych serve`: pull what is missing, start Triton, start the gateway, and end both, whatever ends first.

The order of ending matters: the gateway stops taking requests and drains, its lanes close, then Triton stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette

from gateway import listener, transitions
from gateway.app import create_app
from gateway.catalog import Catalog
from gateway.control import Control
from gateway.greeting import greeting
from gateway.guard import Guard
from gateway.health import Health
from gateway.installed import TritonError
from gateway.kept import Kept
from gateway.keys import Keys, forget_secrets
from gateway.lane import Lanes
from gateway.lifecycle.driver import Lifecycle
from gateway.lifecycle.states import State, View
from gateway.loader import Loader
from gateway.policies import limits_of, policy_of
from gateway.ratelimit import Limits
from gateway.settings import Settings
from gateway.supervisor import START_S, Supervisor
from gateway.triton import Triton, port_is_free
from gateway.watchdog import Patience
from gateway.zygote import zygote_for
from observability import logs
from observability.keeping import Traces
from observability.triton_log import Follower
from pipelines.pipeline import Pipeline, cache_dir
from pipelines.repository import emptied
from pipelines.sources import is_pulled

log = logging.getLogger(__name__)

DRAIN_S = 20
_ARENA_MAX = -8  # M_ARENA_MAX of glibc's mallopt(3)


def serve(settings: Settings, catalog: Catalog, first: Sequence[str]) -> int:
    """Until SIGINT or SIGTERM; answers the exit code. The `first` pipelines are loaded before anybody asks."""
    keys = set_up(settings, [catalog.pipelines[name] for name in first])
    port = int(settings.triton_grpc.rpartition(":")[2])
    log_file = cache_dir() / "logs" / f"triton-{port}.log"
    log_file.unlink(missing_ok=True)
    # The repository is this server's alone: another may serve others.
    triton = Triton(
        emptied(cache_dir() / "model_repository" / str(port)),
        grpc_port=port,
        log_file=log_file,
        zygote=zygote_for(port) if settings.zygote else None,
    )
    log_lines = Follower(log_file)
    kept = Kept(settings)
    triton.spans_url = kept.triton_spans_url
    # Until uvicorn takes the signals over, one of them is an exit like any other: Triton is stopped on the way out.
    previous = {number: signal.signal(number, _exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        log_lines.start()
        triton.start()
        print(f"starting Triton on 127.0.0.1:{triton.grpc_port} (gRPC) and :{triton.http_port} (HTTP)", file=sys.stderr)
        triton.wait_live(START_S)
        if triton.zygote and not first:
            triton.zygote.warm()  # nothing is loaded now, so nobody waits for the processor
        return uvloop.run(_Gateway(settings, keys, catalog, first, triton, kept.traces).run())
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave a server behind
        triton.stop()
        log_lines.stop()
        kept.close()  # the last spans are those of stages that were stopped


def set_up(settings: Settings, first: Sequence[Pipeline]) -> Keys:
    """What a gateway needs before anything runs, whoever runs its Triton."""
    logs.configure(settings.log_level, settings.log_format, source="gateway")
    keys = Keys.from_env(limits=Limits(settings.key_requests_per_minute, settings.key_concurrency))
    forget_secrets(os.environ)
    listener.check_tls(settings)
    listener.warn_if_open(settings, keys_required=keys.required)
    listener.raise_file_limit(settings)
    if not port_is_free(settings.port, settings.host):
        raise TritonError(f"port {settings.port} is in use: choose another with --port (make serve: PORT=…)")
    for pipeline in first:
        _pull(pipeline)
    if "MALLOC_ARENA_MAX" not in os.environ:
        # Its threads take turns anyway. Each with a heap of its own, 9 kB stayed of every load and unload.
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    gc.freeze()  # what is imported is no garbage, and looking through it would stop every stream for 57 ms
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


class _Server(uvicorn.Server):
    """uvicorn raises the signal that ended it again when it has drained; here the exit code says how it went."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Gateway:
    """All that lives in the event loop, and how it is joined."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        catalog: Catalog,
        first: Sequence[str],
        triton: Triton,
        traces: Traces | None,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._catalog = catalog
        self._first = first
        self._traces = traces
        limits = limits_of(settings)
        self._on_gpu = limits.memory.gpu > 0
        self._control = Control(settings.triton_grpc)
        self._supervisor = Supervisor(triton, self._control)
        patience = Patience(token_gap_s=settings.token_gap_s, accept_s=min(10.0, settings.accept_timeout_s / 2))
        self._guard = Guard(self._control, self._supervisor, patience)
        self._lanes = Lanes(
            settings.triton_grpc,
            catalog.pipelines,
            accept_timeout_s=settings.accept_timeout_s,
            witness=self._guard,
        )
        self._loader = Loader(
            self._control,
            self._supervisor,
            self._lanes,
            catalog.pipelines,
            triton.repository,
            self._guard,
            self._lost,
        )
        policies = {name: policy_of(pipeline, settings, gpu=self._on_gpu) for name, pipeline in self._served()}
        self._lifecycle = Lifecycle(limits, policies, self._loader, self._state_changed)
        self._health = Health(self._lifecycle, self._lanes, first, lambda: self._loader.triton_is_there, catalog.broken)

    async def run(self) -> int:
        app = create_app(
            self._lanes,
            self._settings,
            self._lifespan,
            self._keys,
            self._traces,
            lifecycle=self._lifecycle,
            health=self._health,
        )
        return await listen(app, self._settings, self._greet(), self._stop)

    def _stop(self) -> None:
        self._health.stopping = True

    async def _greet(self) -> None:
        """Once what is loaded first answers, or has failed: the log says why. Where nothing is, at once."""
        for name in self._first:
            while self._lifecycle.state(name) not in (State.READY, State.FAILED):
                await asyncio.sleep(0.02)
        pipelines = self._catalog.pipelines
        answering = [pipelines[name] for name in self._first if self._lanes.ready(name)]
        if not self._first:
            answering = [pipeline for pipeline in pipelines.values() if is_pulled(pipeline)]
        if answering:
            print(greeting(self._settings.url, answering, keyed=self._keys.required), flush=True)

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        async with self._control, self._lanes:
            tasks = [
                asyncio.create_task(self._supervisor.run(self._loader), name="supervisor"),
                asyncio.create_task(self._guard.run(), name="guard"),
                asyncio.create_task(self._catalog.watch(self._catalog_changed), name="catalog"),
            ]
            self._lifecycle.open()
            for name in self._first:
                self._lifecycle.operate("load", name)
            yield
            for task in tasks:
                task.cancel()  # stubs that end from here on are meant to
            await asyncio.wait(tasks)
            await self._lifecycle.close()

    def _served(self) -> list[tuple[str, Pipeline]]:
        return list(self._catalog.pipelines.items())

    def _lost(self, pipeline: str, reason: str) -> None:
        self._lifecycle.lost(pipeline, reason)

    def _state_changed(self, pipeline: str, before: State, view: View) -> None:
        transitions.tell(pipeline, before, view)
        if view.state is State.FAILED and view.retry_at is not None and pipeline in self._first:
            # While it is away the gateway is not ready, so nobody might ever ask for it.
            wait_s = max(0.0, view.retry_at - time.monotonic())
            asyncio.get_running_loop().call_later(wait_s, self._lifecycle.operate, "load", pipeline)

    def _catalog_changed(self, changed: Mapping[str, Pipeline], removed: frozenset[str]) -> None:
        policies = {name: policy_of(pipeline, self._settings, gpu=self._on_gpu) for name, pipeline in changed.items()}
        self._lifecycle.change(policies, removed)


async def listen(
    app: Starlette, settings: Settings, greet: Coroutine[Any, Any, None], on_stop: Callable[[], None] = lambda: None
) -> int:
    """Serves the app until a signal, and greets meanwhile."""
    server = _Server(listener.configure(app, settings, timeout_graceful_shutdown=DRAIN_S))

    def stop(number: int) -> None:
        on_stop()
        server.handle_exit(number, None)

    async def greeter() -> None:
        while not server.started:
            await asyncio.sleep(0.02)
        await greet

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    greeting_task = asyncio.create_task(greeter(), name="greeting")
    try:
        await server.serve()
    finally:
        greeting_task.cancel()
        greet.close()
    return 0
