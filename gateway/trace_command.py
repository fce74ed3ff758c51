"""`triptych trace`: asks a running gateway for a request's trace, and draws it or writes it to a file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from observability import jaeger, waterfall
from observability.spans import SpanData, read_document

_TIMEOUT_S = 10
_KNOWN = 100_000  # traces that are looked through for the slowest: all of them


class TraceError(Exception):
    """What a user can mend, in one sentence."""


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
    """`key` is the admin's, `certificate` a file with the gateway's own. Raises TraceError."""
    gateway = _Gateway((options.url or local).rstrip("/"), key, certificate)
    id = options.id or _pick(gateway, slow=options.slow)
    path = f"/admin/traces/{urllib.parse.quote(id, safe='')}"
    held = gateway.get(path)
    try:
        spans = read_document(held)
    except ValueError as error:
        raise TraceError(f"{gateway.url} answered with no trace: {error}") from None
    if options.json:
        _write(options.json, json.dumps(jaeger.document(spans), ensure_ascii=False))
    if options.otlp:
        _write(options.otlp, json.dumps(held, ensure_ascii=False))
    if not (options.json or options.otlp):
        _draw(spans, gateway.get(f"{path}/usual"), colour=not options.no_color)
    return 0


def _pick(gateway: _Gateway, *, slow: bool) -> str:
    listed = gateway.get(f"/admin/traces?limit={_KNOWN if slow else 1}")["data"]
    if not listed:
        raise TraceError(f"the gateway at {gateway.url} has answered no request yet: send one, then ask again")
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


def _write(file: str, text: str) -> None:
    if file == "-":
        print(text)
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{file} cannot be written: {error.strerror}") from None


class _Gateway:
    """A running one, asked over HTTP."""

    def __init__(self, url: str, key: str, certificate: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise TraceError(f"--url {url} must begin with http:// or https://")
        self.url = url
        self._key = key
        self._context = None
        if url.startswith("https://") and certificate:
            self._context = ssl.create_default_context(cafile=certificate)
            self._context.check_hostname = False  # the certificate is known, whatever name it is for

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path)
        if self._key:
            request.add_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise TraceError(_refusal(error)) from None
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise TraceError(f"no gateway answers at {self.url} ({reason}): start one, or name it with --url") from None
        except ValueError:
            raise TraceError(f"{self.url} answered with no JSON: is it a gateway?") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"the gateway answered {error.code}"
