"""What is heard of lanes by whoever watches over the stages behind them. Knows neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Witness(Protocol):
    """Who hears what lanes do (`gateway.guard`)."""

    def opened(self, pipeline: str) -> None: ...

    def closed(self, pipeline: str) -> None: ...

    def heard(self, pipeline: str, counters: Mapping[str, float]) -> None: ...

    def submitted(self, pipeline: str, id: str) -> None:
        """One without pictures, which preprocess takes at once."""

    def taken(self, pipeline: str, id: str) -> None: ...

    def ended(self, pipeline: str, id: str) -> None: ...


class Nobody:
    """Where others' Tritons are used, they look after them."""

    def opened(self, pipeline: str) -> None:
        pass

    def closed(self, pipeline: str) -> None:
        pass

    def heard(self, pipeline: str, counters: Mapping[str, float]) -> None:
        pass

    def submitted(self, pipeline: str, id: str) -> None:
        pass

    def taken(self, pipeline: str, id: str) -> None:
        pass

    def ended(self, pipeline: str, id: str) -> None:
        pass
