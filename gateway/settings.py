"""The gateway's settings, from TRIPTYCH_* variables: one frozen dataclass that checks itself.

Errors name the key. Knows nothing of what the settings are for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from gateway.ratelimit import MAX_LIMIT
from observability.logs import FORMATS, LEVELS
from pipelines.terms import MAX_TIMEOUT_MS

PREFIX = "TRIPTYCH_"
_MAX_IMAGE_BYTES = 2**30  # gRPC's messages end at twice that
_TARGET = re.compile(r"[^\s/,]+:\d{1,5}")
_ORIGIN = re.compile(r"https?://[^/\s]+")  # as a browser names one: no path, no slash at the end


class SettingsError(ValueError):
    """A setting cannot be used; the message names its key."""


@dataclass(frozen=True)
class Settings:
    """Every field is a variable: `max_queue` is TRIPTYCH_MAX_QUEUE."""

    host: str = "127.0.0.1"
    port: int = 8080
    triton_grpc: str = "127.0.0.1:8001"  # where the Triton of our own listens
    triton: str = ""  # HOST:PORT of others' that run already, comma-separated; then none of our own is started
    max_body_bytes: int = 1024 * 1024  # of a request, without its pictures
    max_image_bytes: int = 32 * 1024 * 1024  # of the pictures in it, as they are written there
    max_body_memory_bytes: int = 1024 * 1024 * 1024  # of all bodies at once, from their reading to their answers' end
    max_concurrency: int = 512  # choices in one pipeline at once, where its file does not say
    max_queue: int = 1024  # requests that wait beyond that; one more is refused
    max_wait_s: int = 300  # for a turn or a load, of a request that gave itself no time
    max_keep_alive: int = 3600  # seconds that a request may keep its pipeline after it
    memory_mb: int = 0  # of RAM, for all pipelines together; 0: four fifths of what there is
    gpu_memory_mb: int = 0  # the same of the GPUs
    max_loads: int = 2  # pipelines that are loaded at once: they compete for cores and disk
    zygote: int = 1  # processes with all imports done are kept, from which stages are forked; 0: each imports by itself
    max_choices: int = 16  # of one request: n of each prompt
    max_timeout_ms: int = 3_600_000  # the longest that a request may give itself; a longer one is cut to it
    accept_timeout_s: int = 30  # for a pipeline to take a request: preprocess, which takes milliseconds
    token_gap_s: int = 60  # in which an engine that has requests must have made a step, else it hangs; 0: never mind
    key_requests_per_minute: int = 0  # of a key that says nothing else; 0 is no limit
    key_concurrency: int = 0  # and how many of its requests at a time
    cors_origins: str = ""  # of web pages that may ask, comma-separated, or *
    tls_cert: str = ""  # files: the chain, and its key
    tls_key: str = ""
    max_connections: int = 4096  # one more closes the one that has been idle longest
    max_header_bytes: int = 32 * 1024  # of a request: its first line and its headers
    header_timeout_s: int = 10  # for a request's headers to come
    body_timeout_s: int = 120  # for its body
    write_timeout_s: int = 30  # for a client to go on reading
    idle_timeout_s: int = 75  # for a kept connection's next request; longer than the official client keeps one
    log_level: str = "info"
    log_format: str = "auto"  # text on a terminal, else JSON
    trace_ring: int = 512  # the last requests' traces are kept in memory; 0: none, and none is exported for its end
    trace_ring_mb: int = 16  # and in so much of it
    trace_deep: int = 0  # 1: Triton's own spans are in every trace; 0: of requests that ask by x-triptych-trace
    record: int = 0  # so many requests' tensors are kept at every boundary between stages, for `triptych record`
    record_mb: int = 64  # and in so much memory, of each pipeline
    trace_slow_ms: int = 0  # a request that takes longer has its trace exported; 0: only the pipeline's p95 says so

    def __post_init__(self) -> None:
        self._check("host", bool(self.host), "an address to listen on")
        self._check("port", 0 <= self.port <= 65535, "0 (any free one) to 65535")
        self._check("triton_grpc", bool(_TARGET.fullmatch(self.triton_grpc)), "HOST:PORT")
        distinct = len(set(self.tritons)) == len(self.tritons)
        targets_good = distinct and all(map(_TARGET.fullmatch, self.tritons))
        self._check("triton", targets_good, "HOST:PORT of running Tritons' gRPC, each once, comma-separated")
        self._check("max_body_bytes", self.max_body_bytes >= 1, "1 or more")
        self._check("max_image_bytes", 0 <= self.max_image_bytes <= _MAX_IMAGE_BYTES, f"0 to {_MAX_IMAGE_BYTES}")
        largest = self.max_body_bytes + self.max_image_bytes
        self._check("max_body_memory_bytes", self.max_body_memory_bytes >= largest, f"{largest}, the largest, or more")
        self._check("max_concurrency", self.max_concurrency >= 1, "1 or more")
        self._check("max_choices", self.max_choices >= 1, "1 or more")
        self._check("max_timeout_ms", 1 <= self.max_timeout_ms <= MAX_TIMEOUT_MS, f"1 to {MAX_TIMEOUT_MS}")
        self._check("accept_timeout_s", self.accept_timeout_s >= 1, "1 or more")
        self._check("token_gap_s", self.token_gap_s >= 0, "0 (never mind) or more")
        self._check("log_level", self.log_level in LEVELS, ", ".join(LEVELS))
        self._check("log_format", self.log_format in FORMATS, ", ".join(FORMATS))
        self._check("trace_ring", self.trace_ring >= 0, "0 (no traces are kept) or more")
        self._check("trace_ring_mb", self.trace_ring_mb >= 1, "1 or more")
        self._check("trace_deep", self.trace_deep in (0, 1), "0 (where a request asks for it) or 1 (always)")
        self._check("trace_slow_ms", self.trace_slow_ms >= 0, "0 (no threshold) or more")
        self._check("record", self.record >= 0, "0 (none are kept) or more")
        self._check("record_mb", self.record_mb >= 1, "1 or more")
        self._check("max_queue", self.max_queue >= 0, "0 (no queue) or more")
        self._check("max_wait_s", self.max_wait_s >= 1, "1 or more")
        self._check("max_keep_alive", self.max_keep_alive >= 0, "0 or more seconds")
        for key in ("memory_mb", "gpu_memory_mb"):
            self._check(key, getattr(self, key) >= 0, "0 (four fifths of what there is) or more")
        self._check("zygote", self.zygote in (0, 1), "0 (none) or 1")
        self._check("max_loads", self.max_loads >= 1, "1 or more")
        for key in ("key_requests_per_minute", "key_concurrency"):
            self._check(key, 0 <= getattr(self, key) <= MAX_LIMIT, f"0 (no limit) to {MAX_LIMIT}")
        self._check("max_connections", self.max_connections >= 1, "1 or more")
        self._check("max_header_bytes", self.max_header_bytes >= 1024, "1024 or more")
        for key in ("header_timeout_s", "body_timeout_s", "write_timeout_s", "idle_timeout_s"):
            self._check(key, getattr(self, key) >= 1, "1 or more")
        self._check("tls_key", bool(self.tls_cert) or not self.tls_key, f"given with {PREFIX}TLS_CERT")
        for origin in self.origins:
            good = origin == "*" or _ORIGIN.fullmatch(origin)
            self._check("cors_origins", bool(good), "*, or origins like https://example.com, comma-separated")

    @property
    def url(self) -> str:
        """Where it listens, as a client writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"

    @property
    def tritons(self) -> list[str]:
        """Those that run already; none: one of our own."""
        return _listed(self.triton)

    @property
    def origins(self) -> list[str]:
        return _listed(self.cors_origins)

    def _check(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise SettingsError(f"{PREFIX}{key.upper()} = {getattr(self, key)!r} must be {wanted}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """From the variables that are set and not empty; the rest keep their defaults."""
        environ = os.environ if environ is None else environ
        values: dict[str, str | int] = {}
        for known in fields(cls):
            key = PREFIX + known.name.upper()
            if text := environ.get(key, ""):
                values[known.name] = _integer(key, text) if isinstance(known.default, int) else text
        return cls(**values)  # type: ignore[arg-type]


def _listed(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip())]


def _integer(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{key} = {text!r} must be a whole number") from None
