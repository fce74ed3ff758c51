"""The product as a process, for tests: `triptych serve` on free ports, its Triton, and what both leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
from prometheus_client.parser import text_string_to_metric_families

from bench.processes import free_ports
from pipelines.pipeline import cache_dir

START_S = 180

# The files that start a Triton. What they wait for needs the machine: they run after all others (see the Makefile).
SERVERS = {
    "test_bench_coldstart",
    "test_calls",
    "test_cli",
    "test_cold",
    "test_dashboard",
    "test_endpoints",
    "test_orphaned_locks",
    "test_overload",
    "test_parking",
    "test_pictures",
    "test_processes",
    "test_recording",
    "test_retry",
    "test_shapes_product",
    "test_stack",
    "test_trace",
    "test_trace_command",
    "test_triton_log",
    "test_zygote",
}


class Product:
    """A running `triptych serve`, of a Triton of its own or of those at `tritons`."""

    def __init__(
        self,
        folder: Path,
        *pipelines: str,
        env: dict[str, str] | None = None,
        tritons: Sequence[str] = (),
        cold: bool = False,
    ) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        assert not test or Path(test.partition("::")[0]).stem in SERVERS, f"{test}: its file belongs to SERVERS"
        self.port, self.grpc_port = free_port(), free_triple()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http_url = f"http://127.0.0.1:{self.grpc_port - 1}"
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        self.log = folder / f"serve-{self.port}.log"
        command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(self.port)]
        command += ["--triton-grpc-port", str(self.grpc_port)]
        command += [word for target in tritons for word in ("--triton", target)]
        command += ["--cold"] if cold else []
        command += [word for name in pipelines for word in ("--pipeline", name)]
        self.cache = cache = (
            folder / f"cache-{self.port}"
        )  # its logs and rendered models are its own; the weights are shared
        cache.mkdir()
        (cache / "weights").symlink_to(cache_dir() / "weights")
        for made in ("kernels", "compiled", "snapshots"):  # for this machine, once
            (cache_dir() / made).mkdir(parents=True, exist_ok=True)
            (cache / made).symlink_to(cache_dir() / made)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "TRIPTYCH_"))}
        clean["TRIPTYCH_CACHE"] = str(cache)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**clean, **(env or {})})

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> Product:
        wait_for(lambda: self.process.poll() is not None or "\ncurl " in self.log_text(), START_S)
        assert self.process.poll() is None, self.log_text()
        return self

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def logged(self, source: str) -> list[dict[str, Any]]:
        """The log's lines that come from the gateway, from Triton, or from a stage."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["source"] == source]

    def triton_log(self) -> str:
        return (self.cache / "logs" / f"triton-{self.grpc_port}.log").read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def family(self) -> dict[int, str]:
        """Every process below it, by pid, with its command line."""
        return {pid: command_of(pid) for pid in descendants(self.pid)}

    def stub(self, model: str) -> int:
        return next(
            pid for pid, command in self.family().items() if "backend_stub " in command and f"/{model}/1/" in command
        )

    def stubs_anywhere(self) -> dict[str, int]:
        """Every stage's process by its model, also of those whose parent has died."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            words = command_of(int(place.name)).split()
            if len(words) > 2 and words[2].startswith(f"triptych-{self.pid}-"):
                found[Path(words[1]).parent.parent.name] = int(place.name)
        return found

    def triton(self) -> int:
        return next(pid for pid, command in self.family().items() if "bin/tritonserver" in command)

    def shm(self) -> list[str]:
        return [file.name for file in Path("/dev/shm").glob(f"triptych-{self.pid}-*")]

    def client(self) -> Any:
        return triton_grpc.InferenceServerClient(self.grpc_url)

    def infer(self, model: str, inputs: dict[str, str], **options: Any) -> tuple[str, str]:
        """An ordinary `infer()` of an ensemble: its text and finish reason."""
        client = self.client()
        try:
            result = client.infer(model, [bytes_input(*item) for item in inputs.items()], client_timeout=120, **options)
            return result.as_numpy("generated_text")[0].decode(), result.as_numpy("finish_reason")[0].decode()
        finally:
            client.close()

    def counters(self, generate: str) -> dict[str, int]:
        """The engine's own counters, asked of the generate model itself."""
        counters: dict[str, int] = self.operate(generate, "counters")
        return counters

    def operate(self, generate: str, operation: str) -> Any:
        """What a generate model says to an operation that is asked of it directly."""
        client = self.client()
        try:
            outputs = [triton_grpc.InferRequestedOutput("rows")]
            asked = client.infer(generate, [], outputs=outputs, parameters={"operation": operation}, client_timeout=10)
            return json.loads(asked.as_numpy("rows")[0])
        finally:
            client.close()

    def events(self) -> dict[tuple[str, str], float]:
        """What the supervisor has counted, by pipeline and event."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        samples = (sample for family in families for sample in family.samples)
        return {
            (sample.labels["pipeline"], sample.labels["event"]): sample.value
            for sample in samples
            if sample.name == "triptych_supervisor_events_total"
        }

    def state(self, pipeline: str) -> dict[str, Any]:
        """As /admin/pipelines shows it."""
        status, shown = self.get(f"/admin/pipelines/{pipeline}")
        assert status == 200, shown
        return dict(shown)

    def tell(self, pipeline: str, operation: str) -> int:
        asked = urllib.request.Request(f"{self.url}/admin/pipelines/{pipeline}/{operation}", method="POST")
        with urllib.request.urlopen(asked, timeout=10) as response:
            return int(response.status)

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def bytes_input(name: str, text: str) -> Any:
    tensor = triton_grpc.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def free_port() -> int:
    return free_ports(1)


def free_triple() -> int:
    """The middle one of three: Triton's HTTP, gRPC and metrics."""
    return free_ports(3) + 1


def wait_for(condition: Any, timeout: float, what: str = "") -> float:
    """Until it holds; answers how long that took. The timeout catches hangs."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, f"not within {timeout} s: {what or condition}"
        time.sleep(0.005)
    return time.monotonic() - started


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
