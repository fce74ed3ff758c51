"""A running gateway, asked over HTTP by a command of `triptych`; and what came from it written to a file.

Knows no trace and no recording.
"""

from __future__ import annotations

import json
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_TIMEOUT_S = 10


class RemoteError(Exception):
    """What a user can mend, in one sentence."""


class RemoteGateway:
    """`key` is the admin's, `certificate` a file with the gateway's own."""

    def __init__(self, url: str, key: str, certificate: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise RemoteError(f"--url {url} must begin with http:// or https://")
        self.url = url.rstrip("/")
        self._key = key
        self._context = None
        if url.startswith("https://") and certificate:
            self._context = ssl.create_default_context(cafile=certificate)
            self._context.check_hostname = False  # the certificate is known, whatever name it is for

    def get(self, path: str) -> Any:
        """What it answers, read as JSON."""
        return self._json(self.fetch(path))

    def post(self, path: str) -> Any:
        return self._json(self.fetch(path, method="POST"))

    def _json(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError:
            raise RemoteError(f"{self.url} answered with no JSON: is it a gateway?") from None

    def fetch(self, path: str, *, method: str = "GET") -> bytes:
        request = urllib.request.Request(self.url + path, method=method)
        if self._key:
            request.add_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context) as response:
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            raise RemoteError(_refusal(error)) from None
        except OSError as error:
            why = getattr(error, "reason", None) or error
            raise RemoteError(f"no gateway answers at {self.url} ({why}): start one, or name it with --url") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"the gateway answered {error.code}"


def write(file: str, content: bytes) -> None:
    """`-` is stdout. Raises RemoteError."""
    if file == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    try:
        Path(file).write_bytes(content)
    except OSError as error:
        raise RemoteError(f"{file} cannot be written: {error.strerror}") from None
