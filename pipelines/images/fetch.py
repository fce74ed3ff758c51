"""A picture from an http or https URL, fetched so that nobody reaches with it what only this machine can reach.

A host is resolved once, every address that it has is checked, and the connection goes to one of those: asking again
could get another answer. Redirects are followed by hand, each checked anew. Time and size are bounded in all, however
slowly a server answers. No proxies, cookies or credentials. Of pictures it knows their media types.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast
from urllib.parse import quote, urljoin, urlsplit

from pipelines.errors import StageError
from pipelines.images import kinds
from pipelines.images.addresses import allowed
from pipelines.images.connection import Connection, Deadline, Failed, connected, resolved

_FETCH, _HOSTS, _MB, _S = (
    "TRIPTYCH_IMAGE_FETCH",
    "TRIPTYCH_IMAGE_HOSTS",
    "TRIPTYCH_IMAGE_FETCH_MB",
    "TRIPTYCH_IMAGE_FETCH_S",
)
_MAX_MB = 1024
_MAX_S = 300
_MAX_REDIRECTS = 3
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_URL = 8192
_PIECE = 1 << 16
_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")
_LISTED = re.compile(r"(\*\.)?(?P<name>[a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?")
_HARMFUL = re.compile(r"[\x00-\x20\x7f\\]")


class Host(NamedTuple):
    """An entry of the operator's list. Without a port: the usual two."""

    name: str  # begins with a dot: every host below it
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Host:
        found = _LISTED.fullmatch(text.strip().lower())
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 1 <= port <= 65535):
            raise ValueError(f"{_HOSTS}: {text.strip()!r} must be a host, host:port or *.domain")
        return cls(("." if found[1] else "") + found["name"].strip("[]").rstrip("."), port)

    def covers(self, host: str, port: int) -> bool:
        named = host.endswith(self.name) if self.name.startswith(".") else host == self.name
        return named and (port == self.port if self.port else port in _PORTS.values())


@dataclass(frozen=True)
class Fetching:
    """What may be fetched. `max_bytes` holds for every encoded picture, also one that a data URI brings."""

    on: bool = True
    hosts: tuple[Host, ...] = ()  # none: any public host. One that is listed may also be private.
    max_bytes: int = 20 * 1024 * 1024
    seconds: float = 10.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Fetching:
        """From the variables that are set and not empty, for the rest the defaults. ValueError names the variable."""
        environ = os.environ if environ is None else environ
        given = {key: environ.get(key, "").strip() for key in (_FETCH, _HOSTS, _MB, _S)}
        if given[_FETCH] not in ("", "on", "off"):
            raise ValueError(f"{_FETCH} = {given[_FETCH]!r} must be on or off")
        return cls(
            on=given[_FETCH] != "off",
            hosts=tuple(Host.parse(text) for text in given[_HOSTS].split(",") if text.strip()),
            max_bytes=int(_number(_MB, given[_MB] or "20", _MAX_MB) * 1024 * 1024),
            seconds=_number(_S, given[_S] or "10", _MAX_S),
        )


def _number(key: str, text: str, most: int) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= most:
        raise ValueError(f"{key} = {text!r} must be a number above 0 and at most {most}")
    return float(text)


def fetch(url: str, *, param: str, fetching: Fetching) -> bytes:
    """What the URL leads to, if that says that it is a picture. StageError names `param`, and no address."""
    try:
        if not fetching.on:
            raise Failed(
                "is a URL, and this server fetches none: send the picture itself as 'data:image/png;base64,...'"
            )
        deadline = Deadline(fetching.seconds)
        target = _parsed(url)
        for _ in range(_MAX_REDIRECTS + 1):
            with _connection(target, fetching, deadline) as connection:
                answer = _answer(connection, target)
                if answer.status not in _REDIRECTS:
                    return _body(answer, fetching.max_bytes)
                target = _next(target, answer.getheader("location", ""))
        raise Failed(f"redirects more than {_MAX_REDIRECTS} times")
    except Failed as failed:
        raise StageError(f"'{param}' {failed}.", code=kinds.INVALID, param=param) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        message = f"'{param}' could not be fetched: its host broke off, or does not speak HTTP."
        raise StageError(message, code=kinds.INVALID, param=param) from error


class _Target(NamedTuple):
    url: str
    scheme: str
    host: str
    port: int
    path: str  # with the query

    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def _parsed(url: str) -> _Target:
    if len(url) > _MAX_URL:
        raise Failed(f"is a URL of more than {_MAX_URL} characters")
    if _HARMFUL.search(url):
        raise Failed("is a URL with spaces, control characters or backslashes: write them as %20 and so on")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
        if ":" not in host:
            host = host.encode("idna").decode("ascii").lower()
    except ValueError:  # UnicodeError is one
        raise Failed("is not a well-formed URL") from None
    if parts.scheme not in _PORTS:
        raise Failed("leads to a URL that is neither http nor https")
    if "@" in parts.netloc:
        raise Failed("is a URL with a user name or password, which is not sent")
    if not host or not (":" in host or _NAME.fullmatch(host)) or "%" in host or port == 0:
        raise Failed("is not a well-formed URL")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")
    return _Target(url, parts.scheme, host, port or _PORTS[parts.scheme], path)


def _next(target: _Target, location: str) -> _Target:
    if not location:
        raise Failed("redirects without saying where to")
    try:
        following = _parsed(urljoin(target.url, location))
    except ValueError:
        raise Failed("redirects to what is not a well-formed URL") from None
    if target.scheme == "https" and following.scheme == "http":
        raise Failed("redirects from https to http")
    return following


def _connection(target: _Target, fetching: Fetching, deadline: Deadline) -> Connection:
    listed = any(entry.covers(target.host, target.port) for entry in fetching.hosts)
    if fetching.hosts and not listed:
        raise Failed("leads to a host that is not on this server's list of hosts for pictures")
    if not listed and target.port not in _PORTS.values():
        raise Failed("leads to a port other than 80 and 443, from which no picture is fetched")
    addresses = resolved(target.host, target.port, deadline)
    if not all(allowed(address.number, listed=listed) for address in addresses):
        raise Failed("leads to an address that is not public, from which no picture is fetched")
    return connected(addresses, target.host, target.scheme == "https", deadline)


def _answer(connection: Connection, target: _Target) -> http.client.HTTPResponse:
    connection.send(
        (
            f"GET {target.path} HTTP/1.1\r\nHost: {target.authority()}\r\nAccept: image/*\r\n"
            "Accept-Encoding: identity\r\nUser-Agent: triptych\r\nConnection: close\r\n\r\n"
        ).encode("ascii")
    )
    answer = http.client.HTTPResponse(cast(socket.socket, connection), method="GET")
    answer.begin()
    return answer


def _body(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if answer.status != 200:
        raise Failed(f"could not be fetched: its host answers with status {answer.status}")
    coding = (answer.getheader("content-encoding") or "identity").strip().lower()
    if coding != "identity":
        raise Failed("could not be fetched: its host compresses the picture")
    said = (answer.getheader("content-type") or "").partition(";")[0].strip().lower()
    # Servers often give one picture format for another, and whoever sends the URL cannot help that: the bytes decide.
    if said == "image/svg+xml" or not (said.startswith("image/") or kinds.promised(said) == ""):
        raise Failed(f"leads to '{said[:40]}', which is no picture format here: send {kinds.ACCEPTED}")
    too_large = Failed(f"is larger than the {max_bytes} bytes that are fetched: send a smaller picture")
    if answer.length is not None and answer.length > max_bytes:
        raise too_large
    data = bytearray()
    while piece := answer.read(_PIECE):
        data += piece
        if len(data) > max_bytes:
            raise too_large
    if answer.length:
        raise Failed("could not be fetched: its host broke off")
    return bytes(data)
