"""Several running Tritons as one `Backend`: each request goes to one of them, and what becomes of it is remembered.

Each endpoint has lanes of its own; which of them a request takes is `gateway.routing`'s to say. Starts and repairs
nothing: whoever runs a Triton does that. Knows no HTTP and no tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

from gateway.backend import Delta, Stream, Submission
from gateway.lane import Lanes
from gateway.prefixes import beginnings
from gateway.routing import Route, Router
from observability import metrics
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)


class Endpoints:
    """`targets` are HOST:PORT of the Tritons' gRPC: their names in metrics and logs."""

    def __init__(self, targets: Sequence[str], pipelines: Mapping[str, Pipeline], *, accept_timeout_s: float) -> None:
        self._pipelines = dict(pipelines)
        self._lanes = {
            target: Lanes(target, pipelines, accept_timeout_s=accept_timeout_s, endpoint=target) for target in targets
        }
        self._routers = {name: Router(targets) for name in pipelines}
        self._loads = dict.fromkeys(targets, 0)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Endpoints:
        for target, lanes in self._lanes.items():
            await self._open.enter_async_context(lanes)
            metrics.ENDPOINT_IN_FLIGHT.labels(target).set_function(partial(self._loads.__getitem__, target))
            for name in self._pipelines:
                lanes.open(name)
                metrics.ENDPOINT_READY.labels(target, name).set_function(partial(lanes.ready, name))
                metrics.ENDPOINT_EJECTIONS.labels(target, name)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._open.aclose()

    def pipelines(self) -> Mapping[str, Pipeline]:
        return self._pipelines

    def ready(self, pipeline: str) -> bool:
        return any(lanes.ready(pipeline) for lanes in self._lanes.values())

    async def submit(self, submission: Submission) -> RoutedStream:
        name = submission.pipeline
        loads = {target: load for target, load in self._loads.items() if self._lanes[target].ready(name)}
        router = self._routers[name]
        route = router.choose(beginnings(submission.inputs), loads, time.monotonic())
        if route is None:
            raise StageError(f"pipeline '{name}' is ready at no endpoint; try again shortly.", code="unavailable")
        stream = RoutedStream(self, router, route, submission)
        try:
            await stream.open(self._lanes[route.endpoint])
        except BaseException:
            stream.cancel()
            raise
        return stream

    async def recording(self, pipeline: str, span: str) -> bytes:
        """Which endpoint had the request is not remembered: whoever has it kept answers."""
        for lanes in self._lanes.values():
            if found := await lanes.recording(pipeline, span):
                return found
        return b""

    def took(self, endpoint: str, requests: int) -> None:
        self._loads[endpoint] += requests

    def ejected(self, endpoint: str, pipeline: str, error: StageError) -> None:
        metrics.ENDPOINT_EJECTIONS.labels(endpoint, pipeline).inc()
        log.warning("%s is left alone for a while: %s", endpoint, error, extra={"pipeline": pipeline})


class RoutedStream:
    """A stream of one endpoint (`gateway.backend.Stream`), which tells the router how that does."""

    def __init__(self, endpoints: Endpoints, router: Router, route: Route, submission: Submission) -> None:
        self._endpoints = endpoints
        self._router = router
        self._route = route
        self._submission = submission
        self._stream: Stream | None = None
        self._over = False
        self._succeeded = False
        endpoints.took(route.endpoint, 1)

    async def open(self, lanes: Lanes) -> None:
        self._stream = await lanes.submit(self._submission)

    async def next(self) -> Delta:
        assert self._stream
        try:
            delta = await self._stream.next()
        except StageError as error:
            self._failed(error)
            self._end()
            raise
        if not self._succeeded and (any(delta.texts) or delta.finish_reason):
            self._succeeded = True
            self._router.succeeded(self._route)
        if delta.finish_reason:
            self._end()
        return delta

    def cancel(self) -> None:
        if self._stream:
            self._stream.cancel()
        self._end()

    def _failed(self, error: StageError) -> None:
        """A refusal says nothing of the endpoint; that it is gone, or broken inside, does."""
        if error.lost:
            ejected = self._router.lost(self._route, time.monotonic())
        elif error.code == "internal":
            ejected = self._router.failed(self._route, time.monotonic())
        else:
            return
        if ejected:
            self._endpoints.ejected(self._route.endpoint, self._submission.pipeline, error)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._endpoints.took(self._route.endpoint, -1)
            self._router.withdrawn(self._route)
