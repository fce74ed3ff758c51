"""`triptych trace`: asks a running gateway for a request's trace, and draws it or writes it to a file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

from gateway.remote import RemoteError, RemoteGateway, write
from observability import jaeger, waterfall
from observability.spans import SpanData, read_document

_KNOWN = 100_000  # traces that are looked through for the slowest: all of them


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("id", nargs="?", metavar="ID", help="a request id (x-request-id) or a trace id")
    which.add_argument("--last", action="store_true", help="the request that ended last (what no ID means)")
    which.add_argument("--slow", action="store_true", help="the one that took longest, of those still kept")
    parser.add_argument("--json", metavar="FILE", help="write Jaeger JSON, which its UI's upload takes; - is stdout")
    parser.add_argument("--otlp", metavar="FILE", help="write OTLP JSON; - is stdout")
    parser.add_argument("--no-color", action="store_true", help="no colours, as without a terminal or with NO_COLOR")
    parser.add_argument("--url", help="the gateway (http://127.0.0.1:8080)")


def show_trace(options: argparse.Namespace, local: str, *, key: str = "", certificate: str = "") -> int:
    """`key` is the admin's, `certificate` a file with the gateway's own. Raises RemoteError."""
    gateway = RemoteGateway(options.url or local, key, certificate)
    id = options.id or _pick(gateway, slow=options.slow)
    path = f"/admin/traces/{urllib.parse.quote(id, safe='')}"
    held = gateway.get(path)
    try:
        spans = read_document(held)
    except ValueError as error:
        raise RemoteError(f"{gateway.url} answered with no trace: {error}") from None
    if options.json:
        write(options.json, _line(jaeger.document(spans)))
    if options.otlp:
        write(options.otlp, _line(held))
    if not (options.json or options.otlp):
        _draw(spans, gateway.get(f"{path}/usual"), colour=not options.no_color)
    return 0


def _pick(gateway: RemoteGateway, *, slow: bool) -> str:
    listed = gateway.get(f"/admin/traces?limit={_KNOWN if slow else 1}")["data"]
    if not listed:
        raise RemoteError(f"the gateway at {gateway.url} has answered no request yet: send one, then ask again")
    entry = max(listed, key=lambda entry: entry["duration_ms"]) if slow else listed[0]
    return str(entry["span_id"])  # of its server span: clients may repeat a request id


def _draw(spans: list[SpanData], usual: Mapping[str, Any], *, colour: bool) -> None:
    out = sys.stdout
    coloured = colour and out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    lines = waterfall.draw(
        spans,
        usual["stages_ms"],
        usual["requests"],
        width=shutil.get_terminal_size().columns,
        colours=waterfall.ANSI if coloured else waterfall.NO_COLOURS,
        signs=waterfall.UNICODE if _writes(out.encoding, "█├✗•≤×…·") else waterfall.ASCII,
    )
    text = "\n".join(lines) + "\n"
    out.write(text.encode(out.encoding or "utf-8", "replace").decode(out.encoding or "utf-8"))


def _writes(encoding: str | None, text: str) -> bool:
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _line(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"
