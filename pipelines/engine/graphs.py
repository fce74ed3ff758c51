"""Decode steps on a GPU as CUDA graphs: launched as one, so that a step costs the kernels and not Python.

A graph has fixed shapes, so rows and positions are rounded up to sizes that are captured when they are first met. Rows
that only fill up write into a slot that is nobody's, and what they give is dropped. Inputs go into the graph's own
tensors and nothing is read back: the step ends when somebody looks at the logits.

Without a GPU the same rounded step runs as it is, which is how it is tested. Knows no schedule and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.engine.slots import SlotCache

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SPAN = 256  # positions are rounded up to this times a power of two
_WARM_UP = 2  # runs before a capture: libraries allocate their workspaces in the first


@dataclass
class _Graph:
    """One size's inputs and output, and what fills the latter from the former."""

    ids: Tensor  # [1, rows]
    positions: Tensor  # [rows], in their slots
    places: Tensor  # [rows], as the model is told: behind a picture they may be others
    slots: Tensor  # [rows]
    logits: Tensor
    replay: Callable[[], None]


class Graphs:
    """The graphs of one model over one cache. `forward`: ids and places, [1, rows] each, to the logits of all."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], cache: SlotCache, device: torch.device) -> None:
        self._forward = forward
        self._cache = cache
        self._device = device
        self._captures = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._capacity = (0, 0)  # of the cache that they were captured over

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], places: Sequence[int]) -> Tensor:
        """The logits of these rows, in slots 0, 1, 2 …, [rows, vocabulary]. They hold until the next call."""
        rows, span = rounded_rows(len(tokens)), rounded_span(max(positions) + 1)
        nobodys = self._cache.spare(rows, span)
        self._cache.touch(positions)
        if self._cache.now.capacity != self._capacity:  # its tensors are others now
            self.clear()
            self._capacity = self._cache.now.capacity
        graph = self._graphs.get((rows, span))
        if graph is None:
            graph = self._graphs[rows, span] = self._made(rows)
        more = rows - len(tokens)
        self._fill(graph.ids[0], [*tokens, *[0] * more])
        self._fill(graph.positions, [*positions, *[0] * more])
        self._fill(graph.places, [*places, *[0] * more])
        self._fill(graph.slots, [*range(len(tokens)), *[nobodys] * more])
        if graph.logits.numel() == 0:
            self._capture(graph, rows, span)
        graph.replay()
        return graph.logits[: len(tokens)]

    def clear(self) -> None:
        """The addresses that they were captured with are no longer those of the cache, or of the weights."""
        self._graphs.clear()
        self._capacity = (0, 0)

    def _made(self, rows: int) -> _Graph:
        ids, positions, places, slots = (torch.zeros(rows, dtype=torch.long, device=self._device) for _ in range(4))
        return _Graph(ids[None], positions, places, slots, torch.empty(0), lambda: None)

    def _fill(self, target: Tensor, values: Sequence[int]) -> None:
        source = torch.tensor(values, dtype=torch.long)
        target.copy_(source.pin_memory() if self._captures else source, non_blocking=True)

    def _capture(self, graph: _Graph, rows: int, span: int) -> None:
        def run() -> None:
            self._cache.begin_rounded(rows, span, graph.slots, graph.positions)
            graph.logits = self._forward(graph.ids, graph.places[None])

        if not self._captures:
            graph.replay = run
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self._pool):
            run()
        graph.replay = captured.replay


def rounded_rows(rows: int) -> int:
    return next((size for size in ROWS if size >= rows), -(-rows // ROWS[-1]) * ROWS[-1])


def rounded_span(span: int) -> int:
    size = SPAN
    while size < span:
        size *= 2
    return size
