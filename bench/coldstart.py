"""How long a pipeline takes from nothing, and from parked, to its first token, and where that goes.

    python -m bench.coldstart [--model NAME] [--rounds 5]

Starts `triptych serve` with the pipeline alone. Each round, in turns: it is unloaded, all of its stages, and a streamed
request loads it: that is cold; it is parked, and a streamed request wakes it: that is parked. The times are a client's,
to the first text; what the phases of the load took the gateway says. The loading of the weights is measured here,
against a plain read of the same bytes and safetensors' loader of as many, dropped from the page cache before each where
the kernel does it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import processes
from bench.echoes import serving
from bench.report import json_line, median, table
from pipelines.engine.snapshot import Reading
from pipelines.operations import kept_at
from pipelines.pipeline import DEFAULT, get_pipeline

LOAD_S = 300.0
PROMPT = "Name a colour."
PHASES = ("triton", "spawn", "import", "weights", "warm_up", "lane")
_BLOCK = 1 << 24

Measured = dict[str, float]


class BenchError(RuntimeError):
    """Nothing can be measured; the message says why."""


class Gateway:
    """One pipeline behind a running gateway, which this machine administers."""

    def __init__(self, url: str, pipeline: str) -> None:
        self._place = urllib.parse.urlsplit(url).netloc
        self._pipeline = pipeline

    def tell(self, operation: str, until: str) -> None:
        """Until it is in that state, and nothing is being done to it."""
        self._json("POST", f"/admin/pipelines/{self._pipeline}/{operation}")
        deadline = time.monotonic() + LOAD_S
        while (shown := self.shown())["state"] != until or shown["doing"]:
            if time.monotonic() > deadline:
                raise BenchError(f"{self._pipeline} is {shown['state']}, not {until}, after {LOAD_S:g} s")
            time.sleep(0.01)

    def shown(self) -> dict[str, Any]:
        return self._json("GET", f"/admin/pipelines/{self._pipeline}")

    def first_token(self) -> float:
        """Seconds to the first text of a streamed answer."""
        body = {"model": self._pipeline, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection(self._place, timeout=LOAD_S)
        started, first, lines = time.perf_counter(), 0.0, []
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            for line in connection.getresponse():
                lines.append(line)
                if not first and line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    first = time.perf_counter() - started
        except (OSError, ValueError, LookupError) as error:
            raise BenchError(f"no first token: {error!r} after {b''.join(lines)[-300:]!r}") from None
        finally:
            connection.close()
        if not first or b"[DONE]" not in lines[-2]:
            raise BenchError(f"no first token: {b''.join(lines)[-300:]!r}")
        return first

    def _json(self, method: str, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._place, timeout=30)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            told: dict[str, Any] = json.load(answer)
        except OSError as error:
            raise BenchError(f"no gateway answers at {self._place}: {error}") from None
        finally:
            connection.close()
        if answer.status >= 400:
            raise BenchError(f"{method} {path}: {told}")
        return told


def cold(gateway: Gateway) -> Measured:
    gateway.tell("unload", "cold")
    total = gateway.first_token()
    phases = gateway.shown()["phases_s"]
    return {"total": total, "first_token": max(0.0, total - sum(phases.values())), **{p: phases[p] for p in PHASES}}


def parked(gateway: Gateway) -> Measured:
    gateway.tell("park", "parked")
    total = gateway.first_token()
    return {"total": total, "wake": gateway.shown()["wake_s"]}


def measure(gateway: Gateway, rounds: int) -> tuple[list[Measured], list[Measured]]:
    colds: list[Measured] = []
    parkeds: list[Measured] = []
    for turn in range(-1, rounds):  # the first is a warm-up
        found = cold(gateway), parked(gateway)
        if turn >= 0:
            colds.append(found[0])
            parkeds.append(found[1])
        print("warm" if turn < 0 else f"round {turn + 1} of {rounds}", file=sys.stderr)
    return colds, parkeds


def reading(pipeline: str, rounds: int) -> dict[str, float]:
    """Bytes a second of our loader, of a plain read of the same file, and of safetensors' loader of as many."""
    import torch
    from safetensors.torch import load_file, save_file

    kept = kept_at(get_pipeline(pipeline))
    if not kept.exists():
        raise BenchError(f"{kept} is not there: load {pipeline} once, on this machine and with this cache")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        tensors = Path(folder) / "as-many.safetensors"
        part = max(1, kept.stat().st_size // 100)
        save_file({str(number): torch.ones(part, dtype=torch.uint8) for number in range(100)}, tensors)
        loaders: dict[str, tuple[Path, Callable[[Path], Any]]] = {
            "ours": (kept, _ours),
            "raw": (kept, _raw),
            "safetensors": (tensors, lambda path: [each.sum() for each in load_file(path).values()]),
        }
        seen: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(rounds):
            for name, (path, load) in (list if turn % 2 else reversed)(loaders.items()):
                _drop(path)
                started = time.perf_counter()
                load(path)
                seen[name].append(path.stat().st_size / (time.perf_counter() - started))
    return {name: median(rates) for name, rates in seen.items()}


def _ours(path: Path) -> None:
    Reading(path).wait()


def _raw(path: Path) -> None:
    block = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _drop(path: Path) -> None:
    """Out of the page cache, where the kernel follows the advice: what is not written yet stays."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def result(colds: Sequence[Measured], parkeds: Sequence[Measured], rates: Mapping[str, float]) -> dict[str, Any]:
    """Medians of the rounds; ratios are of one round each."""
    phases = {name: median([each[name] for each in colds]) for name in (*PHASES, "first_token")}
    return {
        "cold_first_token_s": median([each["total"] for each in colds]),
        "parked_first_token_s": median([each["total"] for each in parkeds]),
        "parked_vs_cold": median([woken["total"] / all_["total"] for woken, all_ in zip(parkeds, colds, strict=True)]),
        "wake_s": median([each["wake"] for each in parkeds]),
        "load_vs_raw_disk": rates["ours"] / rates["raw"],
        "load_vs_safetensors": rates["ours"] / rates["safetensors"],
        "phases_s": phases,
        "load_average": os.getloadavg()[0],
        "rounds": len(colds),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=DEFAULT, help="a pipeline of the catalog (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(words)
    with processes.terminated_as_exit(), tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        try:
            with serving(Path(folder), [], beside=[arguments.model]) as served:
                colds, parkeds = measure(Gateway(served.url, arguments.model), arguments.rounds)
            rates = reading(arguments.model, arguments.rounds)
        except (BenchError, processes.StartError) as error:
            print(f"bench.coldstart: {error}", file=sys.stderr)
            return 1
    found = result(colds, parkeds, rates)
    rows: list[tuple[str, float]] = [*found["phases_s"].items(), ("cold to first token", found["cold_first_token_s"])]
    rows += [("parked to first token", found["parked_first_token_s"])]
    print(table([arguments.model, "seconds"], rows))
    print()
    print(table(["ratio", ""], [(name, found[name]) for name in _RATIOS]))
    print(json_line(found))
    return 0


_RATIOS = ("parked_vs_cold", "load_vs_raw_disk", "load_vs_safetensors")

if __name__ == "__main__":
    sys.exit(main())
