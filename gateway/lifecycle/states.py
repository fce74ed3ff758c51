"""The words of the lifecycle: what a pipeline is, what may happen to it, and what is to be done about it.

Plain values. Times are seconds of one monotonic clock, whichever the caller has. Knows no rule: those are the
scheduler's.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gateway.lifecycle.budget import NOTHING, Memory


class State(str, enum.Enum):
    """What a pipeline is. A parked one's process stays, without its weights."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    PARKED = "parked"
    DRAINING = "draining"
    FAILED = "failed"


class Work(str, enum.Enum):
    """What is being done to a pipeline, between an action and the event that reports its end: one thing at a time."""

    LOAD = "load"
    PARK = "park"
    WAKE = "wake"
    UNLOAD = "unload"


class Why(str, enum.Enum):
    """What a pipeline leaves memory for."""

    IDLE = "idle"
    EVICTED = "evicted"
    ADMIN = "admin"
    CATALOG = "catalog"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the catalog says of one pipeline's lifecycle."""

    memory: Memory  # what it takes when ready, until it has been measured
    parked: Memory | None = None  # what it takes when parked; None: it cannot be parked
    load_s: float = 10.0  # how long a load takes, until one has been measured
    wake_s: float = 1.0
    pin: bool = False  # loaded without being asked for, and kept
    keep_alive: float = 300.0  # idle seconds until it is parked; inf: for ever
    keep_parked: float = 1800.0  # parked seconds until it is unloaded; inf: for ever; 0: never parked
    max_concurrency: int = 512  # places: a request takes one for each of its choices
    max_queue: int = 1024  # requests that wait though it works at its limit; one more is refused
    priority: int = 0  # the lowest is first, as elsewhere; a step is worth ten seconds of waiting
    min_residency: float = 10.0  # seconds that it stays, once ready, though others want its memory
    version: str = ""  # of what is loaded: a changed policy of the same version needs no reload


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for all pipelines together."""

    memory: Memory
    max_loads: int = 1  # at once: loads compete for cores and disk
    max_keep_alive: float = 3600.0  # what a request may ask for
    batch_delay_s: float = 30.0  # by how much a batch request counts as having come later
    patience_s: float = 30.0  # of a waiter, until busy pipelines are drained for it
    backoff_s: float = 1.0  # after the first failure; doubles with each
    max_backoff_s: float = 60.0
    stable_s: float = 15.0  # ready for so long, earlier failures are forgotten (60: bench.soak waited 100 s for one)
    half_life_s: float = 14400.0  # of a visit, in the frequency by which is evicted


# Events: what has happened. Each is reported once, in order.


@dataclass(frozen=True, slots=True)
class Asked:
    """A request wants to start. It is answered by Start or Refuse, by its deadline at the latest."""

    request: str
    pipeline: str
    now: float
    deadline: float = math.inf
    batch: bool = False
    keep_alive: float | None = None  # after it; None: the pipeline's
    places: int = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """A started request has ended, well or not."""

    request: str
    now: float


@dataclass(frozen=True, slots=True)
class Gone:
    """The client has left, whether its request waits or runs. (A running one's places are free from here on.)"""

    request: str
    now: float


@dataclass(frozen=True, slots=True)
class Loaded:
    pipeline: str
    now: float
    memory: Memory | None = None  # measured; None: as expected
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds
    can_park: bool = True  # as far as its policy has it parked


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Nothing of the pipeline is left in memory."""

    pipeline: str
    now: float
    reason: str


@dataclass(frozen=True, slots=True)
class Parked:
    pipeline: str
    now: float
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Woken:
    pipeline: str
    now: float
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Unloaded:
    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The pipeline died, or parking, waking or unloading it failed. What it ran is over: nothing of it need be reported
    any more, and a request that is tried again is Asked again. The next Load replaces whatever is left of it."""

    pipeline: str
    now: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at `Scheduler.next_tick` at the latest."""

    now: float


@dataclass(frozen=True, slots=True)
class Pin:
    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class Unpin:
    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class AdminLoad:
    """Load it now, whatever its backoff."""

    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class AdminUnload:
    """Unload it once it is idle; unpins it. Requests that come meanwhile wait for its next load."""

    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class AdminPark:
    """Park it when it is idle next, pinned or not."""

    pipeline: str
    now: float


@dataclass(frozen=True, slots=True)
class CatalogChanged:
    """`policies` are the added and the changed."""

    now: float
    policies: Mapping[str, Policy] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()


Event: TypeAlias = (
    Asked
    | Finished
    | Gone
    | Loaded
    | LoadFailed
    | Parked
    | Woken
    | Unloaded
    | Lost
    | Tick
    | Pin
    | Unpin
    | AdminLoad
    | AdminUnload
    | AdminPark
    | CatalogChanged
)


# Actions: what is to be done. The four on pipelines are reported when they have ended: one report each.


@dataclass(frozen=True, slots=True)
class Load:
    """→ Loaded or LoadFailed."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Park:
    """→ Parked or Lost."""

    pipeline: str
    why: Why


@dataclass(frozen=True, slots=True)
class Wake:
    """→ Woken or Lost."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Unload:
    """→ Unloaded or Lost."""

    pipeline: str
    why: Why


@dataclass(frozen=True, slots=True)
class Start:
    request: str
    pipeline: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """`code` is one of a StageError's (overloaded, unavailable, timeout) or model_not_found."""

    request: str
    pipeline: str
    code: str
    reason: str
    retry_after_s: float | None = None


Action: TypeAlias = Load | Park | Wake | Unload | Start | Refuse


@dataclass(frozen=True, slots=True)
class View:
    """One pipeline as people are shown it."""

    pipeline: str
    state: State
    work: Work | None
    pinned: bool
    running: int
    waiting: int
    memory: Memory = NOTHING  # held now
    needs: Memory = NOTHING
    load_s: float = 0.0
    wake_s: float = 0.0
    eta_s: float = 0.0
    idle_until: float | None = None  # when it is parked or unloaded, if nothing comes
    failures: int = 0
    reason: str = ""
    retry_at: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
