"""Whether the gateway can serve, and which pipelines cannot answer. Knows states, and no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from gateway.backend import Backend
from gateway.lifecycle.driver import Lifecycle
from gateway.lifecycle.states import State, View


class Health:
    """`essential` pipelines are those that are loaded from the start: without one of them the gateway is not ready."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        backend: Backend,
        essential: Collection[str],
        triton_is_there: Callable[[], bool] = lambda: True,
        broken_files: Mapping[Path, str] = MappingProxyType({}),
    ) -> None:
        self._lifecycle = lifecycle
        self._backend = backend
        self._essential = frozenset(essential)
        self._triton_is_there = triton_is_there
        self.broken_files = broken_files  # of the catalog, and what is wrong with each
        self.stopping = False

    def ready(self) -> bool:
        """Nothing but a pipeline that somebody else asked for is amiss."""
        not_ready = self.not_ready()
        served = self._backend.pipelines()
        return bool(
            not self.stopping
            and self._triton_is_there()
            and served
            and not self._essential.intersection(not_ready)
            and len(not_ready) < len(served)
        )

    def not_ready(self) -> list[str]:
        """Those that cannot answer, and are not merely unloaded: the next request would not bring them."""
        return sorted(view.pipeline for view in self._lifecycle.views() if not self._is_well(view))

    def answers(self, pipeline: str) -> bool:
        """A request would be taken, if it waits for the pipeline to be loaded."""
        if self.stopping or not self._triton_is_there():
            return False
        return self._is_well(self._lifecycle.view(pipeline))

    def _is_well(self, view: View) -> bool:
        name = view.pipeline
        if view.state is State.READY:
            return self._backend.ready(name)
        if view.state is State.FAILED or view.failures:  # the latter has died, and is replaced
            return False
        return name not in self._essential or self._lifecycle.was_loaded(name)
