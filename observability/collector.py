"""Whoever takes spans: an OTLP endpoint, by HTTP or gRPC, as the standard variables OTEL_EXPORTER_OTLP_* name it.

Posts one request once. Knows no span, no queue and no second try: it says whether one is worth it.
"""

from __future__ import annotations

import gzip
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_OTLP, _TRACES = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
_LATER = (429, 502, 503, 504)  # OTLP 1.x, "Retryable Response Codes"; and of gRPC:
_LATER_BY_GRPC = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

Post = Callable[[bytes, float], None]  # an ExportTraceServiceRequest, and the seconds that it may take


class NotTaken(Exception):
    """The collector did not take it. `again` says whether it may later, `after_s` when, if it said so."""

    def __init__(self, why: str, *, again: bool, after_s: float | None = None) -> None:
        super().__init__(why)
        self.again = again
        self.after_s = after_s


def option(environ: Mapping[str, str], name: str) -> str:
    """Of traces, or else of all signals."""
    return (environ.get(_TRACES + name) or environ.get(_OTLP + name) or "").strip()


def collector(environ: Mapping[str, str]) -> Post:
    """Raises RuntimeError, with the remedy, for what cannot be used."""
    protocol = option(environ, "PROTOCOL").lower() or "http/protobuf"
    if protocol == "http/protobuf":
        return _by_http(environ)
    if protocol == "grpc":
        return _by_grpc(environ)
    raise RuntimeError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not supported: use http/protobuf or grpc.")


def _by_http(environ: Mapping[str, str]) -> Post:
    # The endpoint of traces is a URL as it is, that of all signals has a path for each below it.
    url = environ.get(_TRACES + "ENDPOINT") or environ[_OTLP + "ENDPOINT"].rstrip("/") + "/v1/traces"
    if not url.startswith(("http://", "https://")):
        raise RuntimeError(f"OTEL_EXPORTER_OTLP_ENDPOINT={url} must begin with http:// or https://.")
    compression = _compression(environ)
    headers = {"Content-Type": "application/x-protobuf", "User-Agent": "triptych", **_headers(environ)}
    if compression:
        headers["Content-Encoding"] = compression
    context = (
        ssl.create_default_context(cafile=option(environ, "CERTIFICATE") or None) if url.startswith("https:") else None
    )
    if context and (certificate := option(environ, "CLIENT_CERTIFICATE")):
        context.load_cert_chain(certificate, option(environ, "CLIENT_KEY") or None)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def post(body: bytes, timeout_s: float) -> None:
        data = _COMPRESS[compression](body) if compression else body
        try:
            with opener.open(urllib.request.Request(url, data, headers), timeout=timeout_s) as response:
                response.read()
        except urllib.error.HTTPError as error:
            with error:
                after = error.headers.get("Retry-After", "")
                raise NotTaken(
                    f"{url} answered {error.code}",
                    again=error.code in _LATER,
                    after_s=float(after) if after.isdecimal() else None,
                ) from None
        except (OSError, http.client.HTTPException) as error:
            raise NotTaken(f"{url}: {error}", again=True) from None

    return post


def _by_grpc(environ: Mapping[str, str]) -> Post:
    import grpc

    given = option(environ, "ENDPOINT")
    scheme, _, rest = given.rpartition("://")
    plain = scheme == "http" or (not scheme and option(environ, "INSECURE").lower() == "true")
    target = rest.rstrip("/")
    compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}.get(_compression(environ))
    metadata = tuple((name.lower(), value) for name, value in _headers(environ).items())
    files = [option(environ, name) for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")]
    certificates = [Path(file).read_bytes() if file else None for file in files]
    calls: list[Any] = []  # made by who posts: a channel does not survive a fork

    def post(body: bytes, timeout_s: float) -> None:
        if not calls:
            options = {"compression": compression}
            channel = (
                grpc.insecure_channel(target, **options)
                if plain
                else grpc.secure_channel(target, grpc.ssl_channel_credentials(*certificates), **options)
            )
            calls.append(channel.unary_unary(_EXPORT))
        try:
            calls[0](body, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code().name
            raise NotTaken(f"{given}: {code}: {error.details()}", again=code in _LATER_BY_GRPC) from None

    return post


def _compression(environ: Mapping[str, str]) -> str:
    name = option(environ, "COMPRESSION").lower().replace("none", "")
    if name and name not in _COMPRESS:
        raise RuntimeError(f"OTEL_EXPORTER_OTLP_COMPRESSION={name} is not supported: use gzip, deflate or none.")
    return name


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    """`name=value,name=value`, each percent-encoded."""
    pairs = [pair.partition("=") for pair in option(environ, "HEADERS").split(",") if pair.strip()]
    unquote = urllib.parse.unquote
    return {unquote(name).strip(): unquote(value).strip() for name, _, value in pairs}
