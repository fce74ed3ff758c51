"""The app: its routes, its state, and which exceptions become responses. Knows a `Backend`, no Triton."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import objects, transitions
from gateway.access import Access
from gateway.admin import ADMIN_ROUTES
from gateway.backend import Backend
from gateway.errors import ApiError, handle
from gateway.formats import Formats
from gateway.generation import Generation, model_not_found
from gateway.health import Health
from gateway.keys import Keys
from gateway.lifecycle.budget import NOTHING
from gateway.lifecycle.driver import Elsewhere, Lifecycle
from gateway.middleware import RequestContext
from gateway.policies import limits_of, policy_of
from gateway.protocol import CHAT, COMPLETION
from gateway.room import Room
from gateway.scrape import triton_metrics
from gateway.settings import Settings
from gateway.state import AppState, RequestState, state_of
from gateway.traces import TRACE_ROUTES
from observability import metrics
from observability.keeping import Traces
from pipelines.errors import StageError
from pipelines.model_config import read_context
from pipelines.sources import is_pulled

EXPOSED = [  # to web pages, of the headers
    "x-request-id",
    "server-timing",
    "retry-after",
    "retry-after-ms",
    "x-cold-start-ms",
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
    *,
    lifecycle: Lifecycle | None = None,
    health: Health | None = None,
) -> Starlette:
    """The gateway over a backend. `lifespan` is entered before the first request, left after the last.

    `traces` are kept, and shown to whoever administers this gateway. Without a `lifecycle` somebody else loads the
    backend's pipelines, and keeps them.
    """
    keys = keys or Keys()
    standing = lifecycle is None
    lifecycle = lifecycle or _standing(backend, settings)
    health = health or Health(lifecycle, backend, backend.pipelines())
    room = Room(settings.max_body_memory_bytes)

    @asynccontextmanager
    async def with_state(app: Starlette) -> AsyncIterator[AppState]:
        async with lifespan() if lifespan else nullcontext():
            if standing:
                lifecycle.open()
            yield AppState(
                backend=backend,
                formats=Formats(),
                settings=settings,
                lifecycle=lifecycle,
                health=health,
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


def _standing(backend: Backend, settings: Settings) -> Lifecycle:
    """Of a backend whose pipelines are there, whatever they take."""
    policies = {
        name: replace(policy_of(pipeline, settings, gpu=False), memory=NOTHING, pin=True)
        for name, pipeline in backend.pipelines().items()
    }
    limits = replace(limits_of(settings), max_loads=max(1, len(policies)))
    return Lifecycle(limits, policies, Elsewhere(), transitions.tell)


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
    return _json(objects.model_list([_model(state, name) for name in sorted(state["backend"].pipelines())]))


async def get_model(request: Request) -> Response:
    state = state_of(request.scope)
    name: str = request.path_params["id"]
    if name not in state["backend"].pipelines():
        raise model_not_found(name)
    return _json(_model(state, name))


def _model(state: RequestState, name: str) -> dict[str, Any]:
    """OpenAI's object, and of ours what it can and whether it is in memory."""
    pipeline = state["backend"].pipelines()[name]
    return {
        **objects.model_object(name, state["started"]),
        "state": state["lifecycle"].state(name).value,
        "pulled": is_pulled(pipeline),
        "description": pipeline.description,
        "context_length": pipeline.context or read_context(pipeline.home) or None,
        "input_modalities": ["text", "image"] if pipeline.takes_images else ["text"],
        "output_modalities": ["text"],
        "max_images": pipeline.max_images,
        "supported_parameters": sorted(CHAT.parameters),
    }


async def live(request: Request) -> Response:
    """The process answers; nothing is said of the pipelines."""
    return _json({"status": "live"})


async def ready(request: Request) -> Response:
    """200 if the gateway can serve, and what it loads from the start can answer."""
    health = state_of(request.scope)["health"]
    if health.ready():
        return _json({"status": "ready", "not_ready": health.not_ready()})
    return _json({"status": "not ready", "not_ready": health.not_ready()}, status=503)


async def pipeline_ready(request: Request) -> Response:
    """200 if a request would be taken, be it after a load."""
    state = state_of(request.scope)
    name: str = request.path_params["id"]
    if name not in state["backend"].pipelines():
        raise model_not_found(name)
    answers = state["health"].answers(name)
    told = {"status": "ready" if answers else "not ready", "state": state["lifecycle"].state(name).value}
    return _json(told, status=200 if answers else 503)


async def show_metrics(request: Request) -> Response:
    state = state_of(request.scope)
    for name in state["backend"].pipelines():
        metrics.PIPELINE_READY.labels(name).set(state["health"].answers(name))
    used, total = state["lifecycle"].memory
    for kind in ("ram", "gpu"):
        metrics.MEMORY_BYTES.labels(kind, "reserved").set(getattr(used, kind))
        metrics.MEMORY_BYTES.labels(kind, "total").set(getattr(total, kind))
    pieces, media_type = metrics.render(request.headers.get("accept", ""))
    body = bytearray()
    for piece in pieces:
        body += piece
        await asyncio.sleep(0)  # whoever came meanwhile is served
    return Response(bytes(body), headers={"content-type": media_type})


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


ROUTES = [
    Route("/v1/chat/completions", Generation(CHAT), methods=["POST"]),
    Route("/v1/completions", Generation(COMPLETION), methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{id:path}", get_model),
    Route("/health/live", live),
    Route("/health/ready", ready),
    Route("/health/ready/{id:path}", pipeline_ready),
    Route("/metrics", show_metrics),
    Route("/metrics/triton", triton_metrics),
    *ADMIN_ROUTES,
    *TRACE_ROUTES,
]
