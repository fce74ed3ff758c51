"""What the scheduler is told of pipelines and of this machine: the catalog's keys and the settings in its words."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

from gateway.lifecycle.budget import Memory
from gateway.lifecycle.states import Limits, Policy
from gateway.settings import Settings
from pipelines.pipeline import Pipeline
from pipelines.sources import size_on_disk

_MB = 10**6
_PROCESSES = 450 * _MB  # of a pipeline's stages, whatever the model: Python, torch, a tokenizer
_SHARE = 0.8  # of the memory there is, for pipelines


def policy_of(pipeline: Pipeline, settings: Settings, *, gpu: bool) -> Policy:
    declared = pipeline.memory_mb * _MB or _PROCESSES + int(1.2 * max(size_on_disk(pipeline), pipeline.size_mb * _MB))
    parked = min(declared, _PROCESSES)
    return Policy(
        memory=Memory(ram=_PROCESSES, gpu=declared) if gpu else Memory(ram=declared),
        parked=Memory(ram=parked + (declared if gpu else 0)) if _can_park(pipeline) else None,
        pin=pipeline.pin,
        keep_alive=_for_ever(pipeline.keep_alive),
        keep_parked=_for_ever(pipeline.keep_parked),
        max_concurrency=pipeline.max_concurrency or settings.max_concurrency,
        max_queue=settings.max_queue if pipeline.max_queue < 0 else pipeline.max_queue,
        priority=pipeline.priority,
        version=pipeline.version,
    )


def limits_of(settings: Settings) -> Limits:
    ram = settings.memory_mb * _MB or int(_SHARE * ram_bytes())
    gpu = settings.gpu_memory_mb * _MB or int(_SHARE * gpu_bytes())
    return Limits(
        memory=Memory(ram=ram, gpu=gpu), max_loads=settings.max_loads, max_keep_alive=float(settings.max_keep_alive)
    )


def _can_park(pipeline: Pipeline) -> bool:
    """A model's own code keeps its weights for itself."""
    return pipeline.engine != "query"


def _for_ever(seconds: int) -> float:
    return math.inf if seconds < 0 else float(seconds)


def ram_bytes() -> int:
    """Of this machine, or what its control group leaves of it (cgroup v2, memory.max)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine


def gpu_bytes() -> int:
    """Of all GPUs together; 0 where there is none, or nothing that says so."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(int(line) for line in said.split() if line.isdecimal()) * 2**20
