"""A stage that is killed while it holds a lock that it shares with tritonserver: the server goes on without it."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from gateway.installed import server_libraries
from tests.product import Product, wait_for

LOCK = 184  # where the lock of a segment's memory is: glibc's mutex
ROBUST_AND_SHARED, WAITED_FOR = 0x90, 0x80000000  # its kind, and a bit of it

# Locks a mutex, dies, and says what the next who locks it is told: 0 if it has it, and whether it may be used on.
SCRIPT = """
import ctypes, mmap, os
libc, memory, kind = ctypes.CDLL(None), mmap.mmap(-1, 4096), (ctypes.c_char * 64)()
mutex = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
libc.pthread_mutexattr_init(kind)
libc.pthread_mutexattr_setpshared(kind, 1)
libc.pthread_mutexattr_setrobust(kind, 1)
libc.pthread_mutex_init(mutex, kind)
if os.fork() == 0:
    libc.pthread_mutex_lock(mutex)
    os._exit(0)
os.wait()
print(libc.pthread_mutex_lock(mutex), libc.pthread_mutex_unlock(mutex), libc.pthread_mutex_lock(mutex))
print(os.popen("echo ${LD_PRELOAD-none}").read())
"""


@pytest.mark.parametrize(("others", "children"), [("", "none"), ("libm.so.6", "libm.so.6")])
def test_a_lock_is_taken_over_from_who_died(others: str, children: str) -> None:
    def said(preload: str) -> list[str]:
        environ = {**os.environ, "LD_PRELOAD": preload}
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True
        ).stdout.split()

    assert said(":".join([*map(str, server_libraries()), *filter(None, [others])])) == ["0", "0", "0", children]
    assert said("")[:3] == ["130", "0", "131"]  # EOWNERDEAD, then ENOTRECOVERABLE


def test_without_a_compiler_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert server_libraries() == []
    assert "a stage that is killed may take tritonserver with it: there is no C++ compiler" in caplog.text


def holds_the_memory(pid: int, memory: mmap.mmap) -> bool:
    """Whether one of its threads holds that lock, and the server waits for it."""
    lock, _, owner, _, kind = struct.unpack_from("5I", memory, LOCK)
    assert kind == ROBUST_AND_SHARED
    return lock & WAITED_FOR != 0 and owner in [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def kill_while_it_holds_it(pid: int, region: Path) -> bool:
    """Stopped for a look now and then, until it is found with it: the server is given the time to wait for it."""
    with region.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as mapped:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.002)
            found = holds_the_memory(pid, mapped)
            os.kill(pid, signal.SIGKILL if found else signal.SIGCONT)
            if found:
                return True
            time.sleep(0.002)
    return False


def test_a_stage_killed_with_a_lock_in_its_hand_does_not_end_triton(own_product: Product) -> None:
    triton, stub = own_product.triton(), own_product.stub("echo-slow-orchestrator")
    assert all(name in Path(f"/proc/{triton}/maps").read_text() for name in ("orphaned_locks", "one_arena"))
    words = Path(f"/proc/{stub}/cmdline").read_bytes().decode().split("\0")
    assert "orphaned_locks" not in Path(f"/proc/{stub}/maps").read_text()
    body = {"model": "echo-slow", "prompt": "a b c", "max_tokens": 2000, "stream": True}

    def stream() -> None:
        with httpx.stream("POST", f"{own_product.url}/v1/completions", json=body, timeout=60) as response:
            for _ in response.iter_lines():
                pass

    streams = [threading.Thread(target=stream) for _ in range(8)]
    for thread in streams:
        thread.start()
    wait_for(lambda: own_product.counters("echo-slow-generate")["running"] == 8, 30)
    assert kill_while_it_holds_it(stub, Path("/dev/shm") / words[2])
    for thread in streams:
        thread.join(timeout=60)
    wait_for(lambda: own_product.events().get(("echo-slow", "repaired")) == 1, 60)
    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 60)
    assert own_product.triton() == triton
    again = httpx.post(f"{own_product.url}/v1/completions", json={**body, "stream": False, "max_tokens": 4}, timeout=30)
    assert again.json()["usage"]["completion_tokens"] == 4
