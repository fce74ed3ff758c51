"""One tritonserver process: how it is started, watched and ended. Nothing of it stays behind.

Knows no HTTP, no pipeline and no model beyond its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc

from gateway.bound import bound
from gateway.installed import TritonError, backend_directory, environment, server_home, server_libraries
from gateway.zygote import Zygote
from observability import triton_spans

_SHM = Path("/dev/shm")
_SHM_PREFIX = "triptych-"
_EXIT_S = 5  # how long the server waits for requests in flight


@dataclass(frozen=True)
class Stub:
    """The process of one model. Whoever gets it closes the descriptor."""

    pid: int
    model: str
    region: str  # of shared memory
    descriptor: int  # becomes readable when the process ends (pidfd_open)

    def remove_shm(self) -> None:
        """For a stub that died: nobody else removes what it leaves."""
        with contextlib.suppress(OSError):
            (_SHM / self.region).unlink()


class Triton:
    """`start`, then `wait_live`, then `stop` (always). After it has died: `clean_up`, and `start` again.

    It loads no model until it is told to. With a `zygote`, stages are forked from that.
    """

    def __init__(self, repository: Path, *, grpc_port: int, log_file: Path, zygote: Zygote | None = None) -> None:
        self.grpc_port = grpc_port
        self.http_port, self.metrics_port = grpc_port - 1, grpc_port + 1
        self.log_file = log_file
        self.repository = repository
        self.zygote = zygote
        self.spans_url = ""  # where it shall post its own spans
        self._process: subprocess.Popen[bytes] | None = None
        self._shm = f"{_SHM_PREFIX}{os.getpid()}-{grpc_port}-"

    def start(self) -> None:
        for port in (self.http_port, self.grpc_port, self.metrics_port):
            if not port_is_free(port):
                raise TritonError(
                    f"port {port} is in use: choose others with --triton-grpc-port (it takes that and both neighbours)"
                )
        remove_stale_shm()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        known = environment()
        self.start_zygote()
        known |= self.zygote.variables if self.zygote else {}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                bound(self._command(), *server_libraries()),
                env=known,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to act on: first the lanes close, then Triton
            )

    def start_zygote(self) -> None:
        """Unless it runs."""
        if self.zygote:
            self.zygote.start(environment(), self.log_file)

    def _command(self) -> list[str]:
        command = [str(server_home() / "bin" / "tritonserver")]
        command += [f"--model-repository={self.repository}"]
        command += [f"--backend-directory={self._backends()}", "--model-control-mode=explicit"]
        # The configurations are whole; asked to complete them, each stage is started twice for one load.
        command += ["--disable-auto-complete-config"]
        for service, port in (("http", self.http_port), ("grpc", self.grpc_port), ("metrics", self.metrics_port)):
            command += [f"--{service}-address=127.0.0.1", f"--{service}-port={port}"]
        command += ["--strict-readiness=false", f"--exit-timeout-secs={_EXIT_S}"]
        # The backend's default is 1 MB that grows by 1 MB and never shrinks (DESIGN §4).
        for setting in (
            f"shm-region-prefix-name={self._shm}",
            "shm-default-byte-size=16777216",
            "shm-growth-byte-size=16777216",
            "stub-timeout-seconds=300",
        ):
            command += [f"--backend-config=python,{setting}"]
        return command + (triton_spans.arguments(self.spans_url) if self.spans_url else [])

    def _backends(self) -> Path:
        return backend_directory(self.zygote.stand_in if self.zygote else None)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_live(self, timeout_s: float) -> None:
        """Until it answers. May run in a thread."""
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self.grpc_port}")
        deadline = time.monotonic() + timeout_s
        try:
            while not _is_live(client):
                if not self.running():
                    raise TritonError(f"tritonserver stopped: {self.last_error()} ({self.log_file})")
                if time.monotonic() > deadline:
                    raise TritonError(f"tritonserver does not answer after {timeout_s:g} s (see {self.log_file})")
                time.sleep(0.02)
        finally:
            client.close()

    def stubs(self) -> list[Stub]:
        """Those that run now. The backend starts one as: stub MODEL.py REGION … NAME_GROUP_INSTANCE …"""
        found = []
        # By name and not by Path, which interns whatever it is made of: once the interpreter's table of such strings is
        # full, it becomes a megabyte larger (after 160 loads, when this did so).
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\0")
                if words[2].startswith(self._shm) and not self._stands_in(pid):
                    model = words[1].split("/")[-3]
                    found.append(Stub(int(pid), model, words[2], os.pidfd_open(int(pid))))
        return found

    def _stands_in(self, pid: str) -> bool:
        """Whether it has only asked for the stage's process so far."""
        return self.zygote is not None and os.readlink(f"/proc/{pid}/exe") == str(self.zygote.stand_in)

    def stop(self) -> None:
        if self._process and self.running():
            self._process.send_signal(signal.SIGTERM)
            self._wait_for_stages(time.monotonic() + _EXIT_S + 5)
            self._process.kill()
            self._process.wait()
        if self.zygote:
            self.zygote.stop()
        self.clean_up()

    def _wait_for_stages(self, deadline: float) -> None:
        """The server ends them once nothing is in flight. Of itself it would go on waiting: for its next look, a second
        later, and for what was in flight in a stage that was killed, five seconds in vain."""
        while self.running() and time.monotonic() < deadline and (stubs := self.stubs()):
            for stub in stubs:
                os.close(stub.descriptor)
            time.sleep(0.05)

    def clean_up(self) -> None:
        """What a server leaves that did not end well."""
        self._end_stubs()
        for segment in _SHM.glob(f"{self._shm}*"):
            with contextlib.suppress(OSError):
                segment.unlink()

    def _end_stubs(self) -> None:
        """Stubs end with their server; one that hangs is ended by its shared-memory name, which is ours alone."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._shm.encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def last_error(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        errors = [line for line in lines if re.match(r"E\d{4} ", line) or line.startswith("error:")]
        return (
            errors[-1].split("] ", 1)[-1][:300]
            if errors
            else f"exit code {self._process.returncode if self._process else '?'}"
        )


def _is_live(client: Any) -> bool:
    try:
        return bool(client.is_server_live(client_timeout=10))
    except tritonclient.grpc.InferenceServerException:
        return False  # not listening yet


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def remove_stale_shm() -> None:
    """The segments of servers whose owner is gone (`kill -9` of everything leaves them)."""
    for segment in _SHM.glob(f"{_SHM_PREFIX}*"):
        owner = segment.name.removeprefix(_SHM_PREFIX).split("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                segment.unlink()
