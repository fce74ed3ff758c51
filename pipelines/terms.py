"""How urgent a request is and how long it may take: what travels beside its sampling, as request parameters.

The same two parameters at the orchestrator, the ensemble and generate. Knows no Triton, no HTTP and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.errors import StageError

PRIORITY = "queue_priority"  # not `priority`: Triton takes that one for itself, and no model ever sees it
TIMEOUT = "timeout_ms"
MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_MS = 2**31 - 1  # 24 days


@dataclass(frozen=True)
class Terms:
    """Of the requests that wait the lowest `priority` is first. `timeout_ms` None: it may take as long as it takes."""

    priority: int = 0
    timeout_ms: int | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Terms:
        """From a request's parameters; those that are not given keep their defaults."""
        if PRIORITY not in parameters and TIMEOUT not in parameters:
            return DEFAULT
        timeout_ms = whole_number(parameters, TIMEOUT, 1, MAX_TIMEOUT_MS) if TIMEOUT in parameters else None
        priority = whole_number(parameters, PRIORITY, -MAX_PRIORITY, MAX_PRIORITY) if PRIORITY in parameters else 0
        return cls(priority, timeout_ms)

    def parameters(self) -> dict[str, int]:
        """As the next model is told them: only what is not the default."""
        given = {PRIORITY: self.priority} if self.priority else {}
        return given if self.timeout_ms is None else {**given, TIMEOUT: self.timeout_ms}

    def after(self, seconds: float) -> Terms:
        """What is left of them after so long. Raises StageError, `timeout`, where no time is."""
        if self.timeout_ms is None:
            return self
        left = self.timeout_ms - int(seconds * 1000)
        if left <= 0:
            raise time_is_up()
        return replace(self, timeout_ms=left)


DEFAULT = Terms()


def time_is_up(stage: str = "") -> StageError:
    return StageError(
        "The time that the request gave itself was over before its answer was whole.", code="timeout", stage=stage
    )


def whole_number(values: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """The integer of this name, within bounds; a StageError names it if it is anything else."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise StageError(f"'{name}' must be an integer.", param=name)
    if not low <= value <= high:
        raise StageError(f"'{name}' must be between {low} and {high}, not {value}.", param=name)
    return value
