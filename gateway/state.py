"""The typed state of the app (Starlette's lifespan state) and of a request, which is a copy with more."""

from __future__ import annotations

from typing import TypedDict, cast

from starlette.types import Scope

from gateway.backend import Backend
from gateway.formats import Formats
from gateway.health import Health
from gateway.keys import Keys
from gateway.lifecycle.driver import Lifecycle
from gateway.room import Room
from gateway.settings import Settings
from observability.keeping import Traces


class AppState(TypedDict):
    backend: Backend
    formats: Formats
    settings: Settings
    lifecycle: Lifecycle
    health: Health
    keys: Keys
    room: Room  # for bodies
    traces: Traces | None
    started: int  # unix seconds


class RequestState(AppState):
    request_id: str
    timings: dict[str, float]  # ms by name, in order: what Server-Timing says
    headers: list[tuple[bytes, bytes]]  # what else the response has, whatever answers
    key: str  # whose it is; missing where no key was asked for


def state_of(scope: Scope) -> RequestState:
    return cast(RequestState, scope["state"])
