"""The app: its routes, its state, and which exceptions become responses. Knows a `Backend`, no Triton."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import objects
from gateway.access import Access
from gateway.admission import Admission
from gateway.backend import Backend
from gateway.errors import ApiError, handle
from gateway.formats import Formats
from gateway.generation import Generation, model_not_found
from gateway.keys import Keys
from gateway.middleware import RequestContext
from gateway.protocol import CHAT, COMPLETION
from gateway.room import Room
from gateway.scrape import triton_metrics
from gateway.settings import Settings
from gateway.state import AppState, state_of
from gateway.traces import TRACE_ROUTES
from observability import metrics
from observability.keeping import Traces
from pipelines.errors import StageError

EXPOSED = [  # to web pages, of the headers
    "x-request-id",
    "server-timing",
    "retry-after",
    "retry-after-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
]


def create_app(
    backend: Backend,
    settings: Settings,
    lifespan: Callable[[], AbstractAsyncContextManager[None]] | None = None,
    keys: Keys | None = None,
    traces: Traces | None = None,
) -> Starlette:
    """The gateway over a backend. `lifespan` is entered before the first request, left after the last.

    `traces` are kept, and shown to whoever administers this gateway.
    """
    admission = Admission(settings.max_concurrency, settings.max_queue)
    keys = keys or Keys()
    room = Room(settings.max_body_memory_bytes)

    @asynccontextmanager
    async def with_state(app: Starlette) -> AsyncIterator[AppState]:
        async with lifespan() if lifespan else nullcontext():
            yield AppState(
                backend=backend,
                formats=Formats(backend.pipelines().values()),
                settings=settings,
                admission=admission,
                keys=keys,
                room=room,
                traces=traces,
                started=int(time.time()),
            )

    app = Starlette(
        routes=ROUTES,
        middleware=[*_cors(settings.origins), Middleware(RequestContext), Middleware(Access, keys=keys)],
        exception_handlers={StageError: handle, ApiError: handle, HTTPException: handle},
        lifespan=with_state,
    )
    app.router.redirect_slashes = False  # an unknown URL is a 404, not a way to another one
    return app


def _cors(origins: list[str]) -> list[Middleware]:
    """Outside everything, so that a page may read every answer, and a preflight needs no key (it has none)."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            max_age=3600,
        )
    ]


async def list_models(request: Request) -> Response:
    state = state_of(request.scope)
    return _json(objects.model_list(sorted(state["backend"].pipelines()), state["started"]))


async def get_model(request: Request) -> Response:
    state = state_of(request.scope)
    name: str = request.path_params["id"]
    if name not in state["backend"].pipelines():
        raise model_not_found(name)
    return _json(objects.model_object(name, state["started"]))


async def live(request: Request) -> Response:
    """The process answers; nothing is said of the pipelines."""
    return _json({"status": "live"})


async def ready(request: Request) -> Response:
    """200 only if every served pipeline can answer now, and there is one."""
    backend = state_of(request.scope)["backend"]
    served = sorted(backend.pipelines())
    not_ready = [name for name in served if not backend.ready(name)]
    if served and not not_ready:
        return _json({"status": "ready", "not_ready": []})
    return _json({"status": "not ready", "not_ready": not_ready}, status=503)


async def show_metrics(request: Request) -> Response:
    backend = state_of(request.scope)["backend"]
    for name in backend.pipelines():
        metrics.PIPELINE_READY.labels(name).set(backend.ready(name))
    data, media_type = metrics.render(request.headers.get("accept", ""))
    return Response(data, headers={"content-type": media_type})


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


ROUTES = [
    Route("/v1/chat/completions", Generation(CHAT), methods=["POST"]),
    Route("/v1/completions", Generation(COMPLETION), methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{id:path}", get_model),
    Route("/health/live", live),
    Route("/health/ready", ready),
    Route("/metrics", show_metrics),
    Route("/metrics/triton", triton_metrics),
    *TRACE_ROUTES,
]
