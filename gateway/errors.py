"""The one place that says what an exception looks like to a client: status, error object, headers.

Knows no stage and no route. Nothing of an unexpected exception is shown: its text goes to the log, under the
request id that the client also has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pipelines.errors import StageError

log = logging.getLogger(__name__)

_STATUS = {
    "invalid_request": 400,
    "invalid_image": 400,
    "unsupported_parameter": 400,
    "context_length_exceeded": 400,
    "model_not_found": 404,
    "model_not_pulled": 404,
    "overloaded": 429,
    "unavailable": 503,
    "unhealthy": 503,
    "timeout": 504,
}
# The official client obeys it, and retries 429 and 503 twice.
_RETRY_AFTER_S = {"overloaded": 1, "unavailable": 2, "unhealthy": 2}


class ApiError(Exception):
    """A refusal of the gateway's own, that no stage can have: an unknown model, a body too large."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = "",  # where OpenAI's is not the status's own
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type
        self.headers = headers or {}


class ClientGone(Exception):
    """The client has disconnected: there is nobody to answer."""


@dataclass(frozen=True)
class Failure:
    """What a client is told."""

    status: int
    code: str
    message: str
    param: str | None = None
    stage: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = ""  # the status's own, if empty

    def body(self) -> dict[str, Any]:
        """The OpenAI error object; `stage` is ours, where one is known."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type or _type(self.status),
            "param": self.param,
            "code": self.code,
        }
        if self.stage:
            error["stage"] = self.stage
        return {"error": error}


def failure_of(error: BaseException, request_id: str) -> Failure:
    """What to tell of any exception; one that none of these knows is a 500. Pure: see `log_failure`."""
    if isinstance(error, StageError) and error.code in _STATUS:
        message = error.message
        if error.stage and error.stage not in message:
            message = f"{message} (stage: {error.stage})"
        headers = retry_after(error.retry_after_s or _RETRY_AFTER_S[error.code]) if error.code in _RETRY_AFTER_S else {}
        return Failure(_STATUS[error.code], error.code, message, error.param, error.stage, headers)
    if isinstance(error, ApiError):
        return Failure(error.status, error.code, error.message, error.param, headers=error.headers, type=error.type)
    if isinstance(error, HTTPException):
        return _of_http(error)
    return _internal(error, request_id)


def retry_after(seconds: float) -> dict[str, str]:
    """RFC 9110's header in whole seconds, and the finer one that the official client prefers."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


def log_failure(failure: Failure, error: Exception, request_id: str) -> None:
    """What was not told: once for each failure, by whoever answers it."""
    if failure.code == "internal":
        extra = {"request_id": request_id, "stage": failure.stage or None}
        log.error("request failed: %s", error, exc_info=error, extra=extra)


def error_response(error: Exception, request_id: str) -> Response:
    failure = failure_of(error, request_id)
    log_failure(failure, error, request_id)
    return failure_response(failure)


def failure_response(failure: Failure) -> Response:
    body = orjson.dumps(failure.body())
    return Response(body, failure.status, headers=dict(failure.headers), media_type="application/json")


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for every exception named in the app."""
    if isinstance(error, HTTPException):
        error = HTTPException(error.status_code, f"{request.method} {request.url.path}", error.headers)
    return error_response(error, request.scope["state"]["request_id"])


def _of_http(error: HTTPException) -> Failure:
    # The codes are OpenAI's own for these two.
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Failure(404, "unknown_url", f"Unknown request URL: {error.detail}.", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        message = f"Not allowed: {error.detail}. Allowed here: {allowed}."
        return Failure(405, "method_not_supported", message, headers=headers)
    return Failure(error.status_code, "invalid_request", str(error.detail), headers=headers)


def _internal(error: BaseException, request_id: str) -> Failure:
    # A Triton error string may hold a traceback, so not even a StageError's own words are shown.
    stage = error.stage if isinstance(error, StageError) else ""
    who = f"The {stage} stage" if stage else "The server"
    message = f"{who} failed. The server's log has the details under request id {request_id}."
    return Failure(500, "internal", message, stage=stage)


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"
