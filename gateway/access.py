"""Who may ask what: the middleware that wants a key for /v1, and holds its owner to its limits.

Knows no pipeline and no answer. Health is open, so that whatever watches over the gateway needs no key. Without keys
everything is open, as it is without this.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.connection import header
from gateway.errors import ApiError, retry_after
from gateway.keys import Key, Keys
from gateway.ratelimit import Limiter
from gateway.state import state_of

# What a proxy adds: the connection is then its, and says nothing of the client.
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


class Access:
    """Around the routes. A refusal is raised as an ApiError, for whatever is around this to answer."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._keys = keys
        self._limiters: dict[str, Limiter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys.required or not _guarded(scope):
            return await self.app(scope, receive, send)
        key = self._admit(scope)
        state = state_of(scope)
        state["key"] = key.name
        limiter = self._limiter(key)
        if scope["method"] != "POST":  # to look costs nothing
            state["headers"] += limiter.headers()
            return await self.app(scope, receive, send)
        refusal = limiter.begin()
        state["headers"] += limiter.headers()
        if refusal:
            headers = retry_after(refusal.wait_ms / 1000)
            raise ApiError(429, refusal.message, code="rate_limit_exceeded", type="requests", headers=headers)
        try:
            await self.app(scope, receive, send)
        finally:
            limiter.end()

    def _admit(self, scope: Scope) -> Key:
        presented = bearer(scope)
        key = self._keys.find(presented) if presented else None
        if key:
            return key
        if presented:
            message, challenge = "The API key is not one of this server's.", 'Bearer error="invalid_token"'
        else:
            message, challenge = "An API key is needed, in the header `Authorization: Bearer KEY`.", "Bearer"
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})

    def _limiter(self, key: Key) -> Limiter:
        limiter = self._limiters.get(key.name)
        if limiter is None:
            limiter = self._limiters[key.name] = Limiter(key.limits)
        elif limiter.limits != key.limits:  # its file has changed
            limiter.change(key.limits)
        return limiter


_METRICS = ("/metrics", "/metrics/triton")


def _guarded(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith("/v1/") or (path in _METRICS and not from_loopback(scope))


def bearer(scope: Scope) -> str:
    """The key that a request presents, or ""."""
    scheme, _, key = header(scope, b"authorization").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def from_loopback(scope: Scope) -> bool:
    """Whether the client is on this machine itself, and not only the proxy that speaks for it."""
    return _is_loopback((scope.get("client") or ("",))[0]) and not any(header(scope, name) for name in _FORWARDED)


def may_administer(scope: Scope) -> bool:
    """Whether it has the admin key, or comes from this machine and not out of a web page.

    A page from anywhere can make a browser on this machine ask (the browser then names an Origin), and under a name of
    its own that resolves to this machine (the Host is then that name).
    """
    presented = bearer(scope)
    if presented:
        return state_of(scope)["keys"].is_admin(presented)
    if header(scope, b"origin") or header(scope, b"sec-fetch-site") not in ("", "none", "same-origin"):
        return False
    return from_loopback(scope) and _is_local_name(header(scope, b"host"))


def _is_local_name(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
