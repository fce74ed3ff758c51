"""What a running product holds: processes, shared memory, descriptors, memory. Counted before and after, compared.

Knows /proc and the names that a Triton gives its shared memory; not what has happened between.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import processes

_DESCRIPTORS = 16  # more or less: kept connections, files that are just being read


@dataclass(frozen=True)
class Held:
    """`processes` and `resident` (bytes) by name; descriptors are the gateway's."""

    processes: Mapping[str, int]
    zombies: int
    shared_memory: int  # segments
    descriptors: int
    resident: Mapping[str, int]


def held(serve: int) -> Held:
    """Of the process that is `triptych serve`, and what is below it."""
    family = processes.tree(serve)
    zombies = [pid for pid in family if processes.is_zombie(pid)]
    resident: Counter[str] = Counter()
    for name, size in processes.resident(family).items():
        resident[name.rpartition(" (")[0]] += size
    return Held(
        Counter(processes.process_name(pid) for pid in family if pid not in zombies),
        len(zombies),
        sum(1 for _ in Path("/dev/shm").glob(f"triptych-{serve}-*")),
        len(os.listdir(f"/proc/{serve}/fd")),
        resident,
    )


def leaks(before: Held, after: Held, ended: int) -> list[str]:
    """What is there that was not, or not there that was. Memory is shown, and left to who looks: see `bench.stack`.

    Of stubs that were `ended` by a signal Triton asks how only when their model's old copy goes, and what was in flight
    there keeps it: so many zombies there may be.
    """
    found = []
    for name in sorted({*before.processes, *after.processes}):
        had, has = before.processes.get(name, 0), after.processes.get(name, 0)
        if had != has:
            found.append(f"{has} processes {name} instead of {had}")
    if after.zombies > before.zombies + ended:
        found.append(f"{after.zombies} zombies of {ended} processes that were ended")
    if after.shared_memory != before.shared_memory:
        found.append(f"{after.shared_memory} segments of shared memory instead of {before.shared_memory}")
    if after.descriptors > before.descriptors + _DESCRIPTORS:
        found.append(f"{after.descriptors} descriptors of the gateway instead of {before.descriptors}")
    return found
