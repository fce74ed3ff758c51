"""The catalog as it is now: read again when a file of it is added, edited or removed. A broken file is reported once,
and what it declared before is kept.

Knows no lifecycle: whoever watches is told what has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pipelines.pipeline import CatalogError, Pipeline, catalog_files, load_pipeline

log = logging.getLogger(__name__)

LOOK_S = 1.0

Stamp = tuple[int, int]


class Catalog:
    """`pipelines` is one mapping all the while, and `broken` has what is wrong, by file."""

    def __init__(self, only: Sequence[str] = ()) -> None:
        """`only` these are served, if any are named; they must be there."""
        self._only = frozenset(only)
        self._stamps: dict[Path, Stamp] = {}
        self._declared: dict[Path, Pipeline] = {}
        self.pipelines: dict[str, Pipeline] = {}
        self.broken: dict[Path, str] = {}
        self.look()

    def look(self) -> tuple[Mapping[str, Pipeline], frozenset[str]]:
        """Reads what has changed; answers the added and edited pipelines, and the names of those removed."""
        stamps = _stamps(catalog_files())
        if stamps == self._stamps:
            return {}, frozenset()
        for file in self._stamps.keys() - stamps.keys():
            self._declared.pop(file, None)
            self.broken.pop(file, None)
        for file, stamp in stamps.items():
            if self._stamps.get(file) != stamp:
                self._read(file)
        self._stamps = stamps
        now = {pipeline.name: pipeline for file in stamps if (pipeline := self._declared.get(file))}
        if self._only:
            now = {name: pipeline for name, pipeline in now.items() if name in self._only}
        changed = {name: pipeline for name, pipeline in now.items() if self.pipelines.get(name) != pipeline}
        removed = frozenset(self.pipelines.keys() - now.keys())
        self.pipelines.update(changed)
        for name in removed:
            del self.pipelines[name]
        return changed, removed

    def _read(self, file: Path) -> None:
        try:
            self._declared[file] = load_pipeline(file)
            self.broken.pop(file, None)
        except CatalogError as error:
            self.broken[file] = str(error)
            log.error("the catalog's %s is left as it was: %s", file.name, error)

    async def watch(self, tell: Callable[[Mapping[str, Pipeline], frozenset[str]], None]) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            changed, removed = self.look()
            if changed or removed:
                log.info("the catalog has changed: %s", ", ".join(sorted([*changed, *removed])))
                tell(changed, removed)


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    found = {}
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # removed in this moment
        found[file] = (status.st_mtime_ns, status.st_size)
    return found
