"""A pipeline loaded and unloaded again and again: what of it stays with the server and the gateway.

    python -m tests.loads --loads 1000

prints memory, descriptors, shared memory and zombies as it goes, and how far they are from the first line's. A short
version is in test_cold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.processes import terminated_as_exit
from tests.product import Product, alive

SMALL = {"TRIPTYCH_TRACE_RING": "16"}  # what is kept of requests is full by the first look


class Left(NamedTuple):
    """What there is while nothing is loaded. Memory is that of both processes, in kB: anonymous, and of files."""

    gateway_kb: int
    server_kb: int
    descriptors: int
    segments: int
    zombies: int
    zygote_kb: int


def left(product: Product) -> Left:
    pids = (product.pid, product.triton())
    gateway, server = (resident_kb(pid) for pid in pids)
    descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    zombies = sum(not alive(pid) for pid in product.family())
    zygote = sum(resident_kb(pid) for pid, command in product.family().items() if command.startswith("triptych zygote"))
    return Left(gateway, server, descriptors, len(product.shm()), zombies, zygote)


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main() -> int:
    from tests.test_cold import ask, declared, unloaded

    parser = argparse.ArgumentParser(prog="python -m tests.loads")
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--first", type=int, default=20, help="loads before the first look (default: %(default)s)")
    given = parser.parse_args()
    with terminated_as_exit(), tempfile.TemporaryDirectory(prefix="triptych-loads-") as name:
        folder = Path(name)
        (folder / "catalog").mkdir()
        (folder / "catalog" / "cold.toml").write_text(declared(), encoding="utf-8")
        env = {"TRIPTYCH_CATALOG": str(folder / "catalog"), **SMALL}
        product = Product(folder, env=env, cold=True)
        try:
            product.wait_ready()
            before: Left | None = None
            for number in range(1, given.first + given.loads + 1):
                ask(product, "cold")
                unloaded(product, "cold")
                if number >= given.first and (number - given.first) % 10 == 0:
                    now = left(product)
                    before = before or now
                    columns = zip(now._fields, now, before, strict=True)
                    told = [f"{name} {value} ({value - then:+d})" for name, value, then in columns]
                    print(number - given.first, *told, flush=True)
        finally:
            product.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
