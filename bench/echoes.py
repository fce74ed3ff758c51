"""The product as a bench serves it: echo pipelines of its own, in a catalog folder of its own.

An echo has the default pipeline's tokenizer and no model, so there is nothing more to download. Knows how
`triptych serve` is started; not what is asked of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import processes
from pipelines.pipeline import DEFAULT, catalog_dirs, get_pipeline

START_S = 300


@dataclass(frozen=True)
class Echo:
    """One pipeline: its name and its file."""

    name: str
    toml: str


@dataclass(frozen=True)
class Served:
    """Where everything listens, and the process to watch."""

    url: str
    triton: str  # gRPC
    pid: int
    log: Path


def declaration(name: str, **keys: str | int | float) -> Echo:
    model = get_pipeline(DEFAULT)
    given = {"name": name, "source": model.source, "parts": list(model.parts), "engine": "echo", **keys}
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
    hashes = "".join(f"{json.dumps(file)} = {json.dumps(value)}\n" for file, value in model.sha256.items())
    return Echo(name, f"{table}[sha256]\n{hashes}")


@contextlib.contextmanager
def serving(
    folder: Path, echoes: Sequence[Echo], beside: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """The product with these echoes and the catalog's pipelines `beside` them, ready."""
    catalog = folder / "catalog"
    catalog.mkdir(exist_ok=True)
    for echo in echoes:
        (catalog / f"{echo.name}.toml").write_text(echo.toml, encoding="utf-8")
    folders = [str(part) for part in catalog_dirs()[1:]] + [str(catalog)]
    http = processes.free_ports()
    triton = processes.free_ports(3) + 1  # HTTP is the one below gRPC, metrics the one above
    serve = ["gateway.cli", "serve", "--port", str(http), "--triton-grpc-port", str(triton)]
    serve += [word for name in (*(echo.name for echo in echoes), *beside) for word in ("--pipeline", name)]
    log, url = folder / f"serve-{http}.log", f"http://127.0.0.1:{http}"
    with processes.running(serve, log, {**(environ or {}), "TRIPTYCH_CATALOG": ":".join(folders)}) as process:
        processes.wait_ready(process, f"{url}/health/ready", log, START_S)
        yield Served(url, f"127.0.0.1:{triton}", process.pid, log)
