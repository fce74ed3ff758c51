"""The pipelines over HTTP, for whoever administers the gateway: shown, and told to come or to go.

Decides nothing: the lifecycle does.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gateway.access import may_administer
from gateway.errors import ApiError
from gateway.lifecycle.budget import Memory
from gateway.lifecycle.driver import OPERATIONS, Lifecycle
from gateway.lifecycle.states import View
from gateway.state import AppState, state_of


async def list_pipelines(request: Request) -> Response:
    state = _administered(request.scope)
    used, total = state["lifecycle"].memory
    views = sorted(state["lifecycle"].views(), key=lambda view: view.pipeline)
    return _json(
        {
            "object": "list",
            "data": [shown(view) for view in views],
            "memory": {"reserved": _bytes(used), "total": _bytes(total)},
            "broken_files": {str(file): why for file, why in state["health"].broken_files.items()},
        }
    )


async def get_pipeline(request: Request) -> Response:
    name, lifecycle = _pipeline(request)
    return _json(shown(lifecycle.view(name)))


async def operate(request: Request) -> Response:
    """202 and the pipeline as it is from here on: what it was told takes its time."""
    name, lifecycle = _pipeline(request)
    operation: str = request.path_params["operation"]
    if operation not in OPERATIONS:
        told = f"A pipeline can be told to {', '.join(OPERATIONS)}, not to '{operation[:40]}'."
        raise ApiError(404, told, code="not_found", param="operation")
    lifecycle.operate(operation, name)
    return _json(shown(lifecycle.view(name)), status=202)


ADMIN_ROUTES = [
    Route("/admin/pipelines", list_pipelines),
    Route("/admin/pipelines/{name}", get_pipeline),
    Route("/admin/pipelines/{name}/{operation}", operate, methods=["POST"]),
]


def shown(view: View) -> dict[str, Any]:
    """Times are seconds, and from now on where they lie ahead."""
    now = time.monotonic()
    return {
        "pipeline": view.pipeline,
        "state": view.state.value,
        "doing": view.work.value if view.work else None,
        "pinned": view.pinned,
        "running": view.running,
        "waiting": view.waiting,
        "memory_held": _bytes(view.memory),
        "memory_needed": _bytes(view.needs),
        "load_s": round(view.load_s, 3),
        "wake_s": round(view.wake_s, 3),
        "ready_in_s": round(view.eta_s, 3),
        "idle_in_s": None if view.idle_until is None else round(max(0.0, view.idle_until - now), 3),
        "failures": view.failures,
        "reason": view.reason or None,
        "retry_in_s": None if view.retry_at is None else round(max(0.0, view.retry_at - now), 3),
        "phases_s": {phase: round(seconds, 4) for phase, seconds in view.phases.items()},
    }


def _pipeline(request: Request) -> tuple[str, Lifecycle]:
    state = _administered(request.scope)
    name: str = request.path_params["name"]
    if name not in state["backend"].pipelines():
        raise ApiError(404, f"There is no pipeline '{name[:80]}'.", code="model_not_found", param="name")
    return name, state["lifecycle"]


def _administered(scope: Scope) -> AppState:
    if not may_administer(scope):
        message = "Pipelines are administered from this machine alone, and by whoever has the admin key."
        raise ApiError(403, message, code="forbidden")
    return state_of(scope)


def _bytes(memory: Memory) -> dict[str, int]:
    return {"ram_bytes": memory.ram, "gpu_bytes": memory.gpu}


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
