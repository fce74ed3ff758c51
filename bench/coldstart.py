"""How long a pipeline takes from nothing, and from parked, to its first token, and where that goes.

    triptych serve &                      # in another terminal; its Triton is asked directly
    python -m bench.coldstart [--triton 127.0.0.1:8001] [--model NAME] [--rounds 5]

Each round, in turns: the generate model is unloaded and loaded by Triton's model control, then the ensemble answers
with one token: that is cold; it is parked, woken, and a first token comes: that is parked. The loaded weights
are measured here, against a plain read of the same bytes and safetensors' loader of as many, dropped from the page
cache before each where the kernel does it. Leaves the pipeline loaded. Nobody else should use it meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio

from bench.direct import Direct
from bench.report import json_line, median, table
from pipelines import contracts
from pipelines.engine.snapshot import Reading, place
from pipelines.phases import NAMES
from pipelines.pipeline import DEFAULT, get_pipeline

LOAD_S = 300.0
ANSWER_S = 30.0
PROMPT = "Name a colour."
_BLOCK = 1 << 24

_T = TypeVar("_T")

Measured = dict[str, float]


class BenchError(RuntimeError):
    """Nothing can be measured; the message says why."""


class Server:
    """One pipeline on a running Triton."""

    def __init__(self, address: str, pipeline: str) -> None:
        self._client = grpc_aio.InferenceServerClient(address)
        self._direct = Direct(address)
        self._pipeline = pipeline
        self._generate = contracts.model_name(pipeline, "generate")

    async def close(self) -> None:
        await self._direct.close()
        await self._client.close()

    async def operate(self, operation: str) -> dict[str, Any]:
        return await _patiently(lambda: self._operate(operation))

    async def _operate(self, operation: str) -> dict[str, Any]:
        outputs = [grpc.InferRequestedOutput(contracts.ROWS.name)]
        asked = await self._client.infer(
            self._generate,
            [],
            outputs=outputs,
            parameters={contracts.OPERATION: operation},
            client_timeout=ANSWER_S,
        )
        told: dict[str, Any] = json.loads(asked.as_numpy(contracts.ROWS.name)[0])
        return told

    async def unload(self) -> None:
        """Until it is gone: Triton does it in its own time."""
        await self._client.unload_model(self._generate)
        deadline = time.monotonic() + LOAD_S
        while await self._there():
            if time.monotonic() > deadline:
                raise BenchError(f"{self._generate} was not unloaded within {LOAD_S:.0f} s")
            await asyncio.sleep(0.02)

    async def load(self) -> None:
        await asyncio.wait_for(self._client.load_model(self._generate), LOAD_S)

    async def first_token(self) -> None:
        """An answer of one token."""

        async def ask() -> None:
            result = await self._direct.ensemble(self._pipeline, PROMPT, 1, ANSWER_S)
            if result.error:
                raise BenchError(f"no first token: {result.error}")

        await _patiently(ask)

    async def _there(self) -> bool:
        index = await self._client.get_model_repository_index(as_json=True)
        states = {model["name"]: model.get("state", "") for model in index.get("models", [])}
        return states.get(self._generate) not in ("UNAVAILABLE", "", None)


async def _patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Again and again: a gateway that sees a stage gone loads its pipeline too, and it is away for that moment."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            return await ask()
        except (BenchError, grpc.InferenceServerException):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


async def cold(server: Server) -> Measured:
    await server.unload()
    started = time.perf_counter()
    await server.load()
    loaded = time.perf_counter()
    await server.first_token()
    ended = time.perf_counter()
    phases = (await server.operate("state"))["phases_s"]
    return {"total": ended - started, "first_token": ended - loaded, **{name: phases[name] for name in NAMES}}


async def parked(server: Server) -> Measured:
    await server.operate("park")
    started = time.perf_counter()
    wake_s = (await server.operate("wake"))["wake_s"]
    await server.first_token()
    return {"total": time.perf_counter() - started, "wake": wake_s}


async def measure(address: str, pipeline: str, rounds: int) -> tuple[list[Measured], list[Measured]]:
    server = Server(address, pipeline)
    colds: list[Measured] = []
    parkeds: list[Measured] = []
    try:
        if not (await server.operate("state"))["can_park"]:
            raise BenchError(f"{pipeline} cannot be parked")
        for turn in range(-1, rounds):  # the first is a warm-up
            found = await cold(server), await parked(server)
            if turn >= 0:
                colds.append(found[0])
                parkeds.append(found[1])
            print("warm" if turn < 0 else f"round {turn + 1} of {rounds}", file=sys.stderr)
    finally:
        await server.close()
    return colds, parkeds


def reading(pipeline: str, rounds: int) -> dict[str, float]:
    """Bytes a second of our loader, of a plain read of the same file, and of safetensors' loader of as many."""
    import torch
    from safetensors.torch import load_file, save_file

    declared = get_pipeline(pipeline)
    kept = place(declared.home, declared.dtype, declared.quantize, pictures=declared.takes_images)
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
    phases = {name: median([each[name] for each in colds]) for name in (*NAMES, "first_token")}
    return {
        "cold_first_token_s": median([each["total"] for each in colds]),
        "parked_first_token_s": median([each["total"] for each in parkeds]),
        "wake_vs_cold": median([out["wake"] / all_["total"] for out, all_ in zip(parkeds, colds, strict=True)]),
        "load_vs_raw_disk": rates["ours"] / rates["raw"],
        "load_vs_safetensors": rates["ours"] / rates["safetensors"],
        "phases_s": phases,
        "load_average": os.getloadavg()[0],
        "rounds": len(colds),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triton", default="127.0.0.1:8001", help="its gRPC address (%(default)s)")
    parser.add_argument("--model", default=DEFAULT, help="a pipeline that it serves (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(words)
    try:
        colds, parkeds = asyncio.run(measure(arguments.triton, arguments.model, arguments.rounds))
        rates = reading(arguments.model, arguments.rounds)
    except (BenchError, grpc.InferenceServerException, asyncio.TimeoutError) as error:
        print(f"bench.coldstart: {error or type(error).__name__}", file=sys.stderr)
        return 1
    found = result(colds, parkeds, rates)
    rows: list[tuple[str, float]] = [*found["phases_s"].items(), ("cold to first token", found["cold_first_token_s"])]
    rows += [("parked to first token", found["parked_first_token_s"])]
    print(table([arguments.model, "seconds"], rows))
    print()
    print(table(["ratio", ""], [(name, found[name]) for name in _RATIOS]))
    print(json_line(found))
    return 0


_RATIOS = ("wake_vs_cold", "load_vs_raw_disk", "load_vs_safetensors")

if __name__ == "__main__":
    sys.exit(main())
