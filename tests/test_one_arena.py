"""The server's threads share a heap, and the processes it starts do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gateway.installed import server_libraries

# Says how many heaps there are when eight threads have held memory of their own at the same time.
SCRIPT = """
import ctypes, os, subprocess, sys, tempfile, threading
libc = ctypes.CDLL(None)
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(8)
def hold():
    together.wait()
    libc.malloc(ctypes.c_size_t(1000))
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.NamedTemporaryFile() as told:
    file = ctypes.c_void_p(libc.fopen(told.name.encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    print(told.read().count(b"<heap nr="), flush=True)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


def heaps(**environ: str) -> list[int]:
    """Of the process, and of one that it starts."""
    given = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC", "GLIBC", "LD_PRELOAD"))}
    command = [sys.executable, "-c", SCRIPT, SCRIPT]
    done = subprocess.run(command, env={**given, **environ}, capture_output=True, text=True, check=True, timeout=60)
    return [int(word) for word in done.stdout.split()]


def test_one_heap_for_all_threads_of_the_server_alone() -> None:
    preloaded = ":".join(map(str, server_libraries()))
    mine, child = heaps(LD_PRELOAD=preloaded)
    assert mine == 1
    assert child == heaps()[0] > 1


@pytest.mark.parametrize("wanted", ["2", "3"])
def test_who_runs_it_may_say_otherwise(wanted: str) -> None:
    assert heaps(LD_PRELOAD=":".join(map(str, server_libraries())), MALLOC_ARENA_MAX=wanted)[0] == int(wanted)
