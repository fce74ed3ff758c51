"""A transformers model over slots: one forward a step, of decoding rows and chunks of prompts in one flat row.

Knows no request's sampling and no schedule: it is given a plan and answers logits. Whether a model can be run this way
is proved when it is loaded: what the slots give must be what the model gives without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pipelines.engine import Array, Request, attention
from pipelines.engine.graphs import Graphs
from pipelines.engine.scheduler import Chunk, Plan, Row
from pipelines.engine.sight import Piece, Sight
from pipelines.engine.slots import SlotCache, Span, Unsupported, cache_name
from pipelines.sampling import Sampling

if TYPE_CHECKING:
    from pipelines.engine.compiled import Compiled
    from pipelines.engine.native import Kernels

PROOF = ([3, 4, 5, 6, 7, 8, 9, 10, 11], [8, 9, 10, 11])  # prompts of unequal length


class Sample(NamedTuple):
    """A prompt with a picture in it, as the model's own processor makes one. It ends with text."""

    input_ids: Sequence[int]
    features: Mapping[str, Array]


class FlatModel:
    """Raises `Unsupported` for a model that cannot be run this way; it is as it was then.

    `graphs`: whether steps that only decode are run as `graphs` does; None is on a GPU. `compile`: whether a compiled
    step is looked for, and made in the background where there is none. `sample`: what a model that takes pictures is
    proved with, besides text.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_slots: int,
        context: int,
        kv_dtype: torch.dtype | None = None,
        graphs: bool | None = None,
        compile: bool = False,
        sample: Sample | None = None,
    ) -> None:
        self._model = self._caller = model
        config = model.config.get_text_config()
        if not model._can_set_attn_implementation():
            raise Unsupported(f"{config.model_type} has attention of its own making")
        # A model on kernels has attention by them too: a row then has the same bits alone, in a batch or in a chunk.
        kernels = _kernels_alone() if rounds_inputs(model) else None
        self.cache = SlotCache(config, max_slots=max_slots, context=context, dtype=kv_dtype, kernels=kernels)
        exact = model.dtype == torch.float32 and kv_dtype in (None, torch.float32) and not kernels
        self._graphs: Graphs | None = None
        self._compiled: Compiled | None = None
        self._sight: Sight | None = None
        self.compiled = False
        if model.config is not config:  # of its halves one reads text
            self._sight = Sight(model)
            self._caller = self._sight.caller
        self._cache_name = cache_name(self._caller)
        before = config._attn_implementation
        if before == attention.NAME:  # another engine has run it
            self._attend_by(before := "eager")
        try:
            plain = self._plain(sample)
            self._attend_by(attention.NAME)
            self._prove(plain, sample, config.model_type, 0.001 if exact else 0.2)
        except Exception:
            self._attend_by(before)
            raise
        finally:
            self.cache.clear()
        if graphs if graphs is not None else model.device.type == "cuda":
            self._graphs = Graphs(self._told, self.cache, model.device)
        if compile and not self._sight and not self.cache.shares:  # what is compiled knows neither
            from pipelines.engine.compiled import Compiled  # not needed where nothing is compiled, as on a GPU

            self._compiled = Compiled(model, list(zip(PROOF, plain, strict=True)))

    @property
    def name(self) -> str:
        return "fast, compiled" if self._compiled and self._compiled.poll() else "fast"

    def wait_compiled(self) -> None:
        if self._compiled is None:
            raise Unsupported("it takes pictures, or its layers share what they keep: such a model is not compiled")
        self._compiled.wait()

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Tensor:
        """The logits after each row that decodes and each prompt whose last chunk this is, in the plan's order."""
        device = self._model.device
        tokens = [row.tokens[-1] for row in plan.decode]
        positions = [row.computed for row in plan.decode]
        places = [row.computed + _ahead(row) for row in plan.decode]
        if self._graphs is not None and plan.decode and not plan.chunks and not plan.first:
            return self._graphs(tokens, positions, places)
        wanted = list(range(len(tokens)))
        pieces = []
        for chunk in plan.chunks:
            end, row = chunk.start + chunk.length, chunk.row
            if self._sight and row.request.features and chunk.start < len(row.request.input_ids):
                row.given = self._sight.of(row.request, row.given, chunk.start)
                length = min(end, len(row.request.input_ids)) - chunk.start
                pieces.append(Piece(row.given, len(tokens), chunk.start, length))
            places += range(chunk.start + _ahead(row), end + _ahead(row))
            tokens += row.tokens[chunk.start : end]
            if chunk.last:
                wanted.append(len(tokens) - 1)
        spans = [Span(chunk.slot, chunk.start, chunk.length) for chunk in plan.chunks]
        self.cache.begin(plan.first, positions, spans, device)
        ids, kept = torch.tensor([tokens], device=device), torch.tensor(wanted, dtype=torch.long, device=device)
        now = self.cache.now
        if step := self._compiled and self._compiled.poll():
            # Prompts too, and not only what decodes: a row's bits must not depend on whether a prompt is beside it.
            self.compiled = True
            return step(ids, now.all_positions, now.all_slots, kept, self.cache.layers)
        told = torch.tensor([places], device=device) if self._sight else now.all_positions[None]
        logits = self._told(ids, told, kept, pieces)
        for chunk in plan.chunks:
            if chunk.last and chunk.row.given:
                chunk.row.given = chunk.row.given.spent()
        return logits

    def _told(self, ids: Tensor, places: Tensor, wanted: Tensor | int = 0, pieces: Sequence[Piece] = ()) -> Tensor:
        """The logits of a flat pass whose tokens the model is told to be at these places, [1, tokens]."""
        if self._sight is None:
            return self._logits(ids, places, wanted)
        with self._sight.laid(pieces):
            return self._logits(ids, self._sight.positions(places[0], pieces), wanted)

    def _logits(self, ids: Tensor, positions: Tensor, wanted: Tensor | int) -> Tensor:
        with attention.over(self.cache):
            logits: Tensor = self._caller(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=wanted,
                **{self._cache_name: self.cache},
            ).logits
        return logits[0]

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def swap(self, one: int, other: int, length: int) -> None:
        self.cache.swap(one, other, length)

    def settle(self, running: Sequence[Row], kept: Mapping[int, int], capacity: int) -> None:
        """Between two steps: memory beyond the capacity is given back."""
        if self.cache.touched > capacity:
            lengths = {slot: row.computed for slot, row in enumerate(running)}
            self.cache.trim(lengths | dict(kept))

    def clear(self) -> None:
        self.cache.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def _attend_by(self, name: str) -> None:
        """Of a model with a half that sees, the half that reads."""
        model, text = self._model, self._model.config.get_text_config()
        halves = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
        model.set_attn_implementation({halves[0]: name} if halves else name)

    def _plain(self, sample: Sample | None) -> Tensor:
        """What the model says, without a cache, of the prompts that it is proved with."""
        with torch.inference_mode():
            tensors = [torch.tensor([ids], device=self._model.device) for ids in PROOF]
            found = [self._caller(input_ids=ids, use_cache=False).logits[:, -1] for ids in tensors]
            if sample and self._sight:
                found.append(self._model(**self._sight.inputs(*sample), use_cache=False).logits[:, -1])
            return torch.cat(found).float()

    def _prove(self, plain: Tensor, sample: Sample | None, kind: str, tolerance: float) -> None:
        """Two chunks at once, a chunk after another beside a row that decodes, and rows that decode together."""
        long, short = (Row(Request("", ids, Sampling()), (0, 0), list(ids), 0) for ids in PROOF)
        rows, wanted = [long, short], [0, 1, 1]
        try:
            self.forward(Plan(chunks=[Chunk(long, 0, 0, 5), Chunk(short, 1, 0, 3)]))
            long.computed, short.computed = 5, 3
            mixed = self.forward(Plan([short], [Chunk(long, 0, 5, 3)], first=1))
            long.computed = 8
            if sample:
                ids = list(sample.input_ids)
                seen = Row(Request("", ids, Sampling(), features=sample.features), (0, 0), ids, 0)
                half = len(ids) // 2  # in the midst of the picture
                self.forward(Plan(chunks=[Chunk(seen, 2, 0, half)]))
                self.forward(Plan([short], [Chunk(seen, 2, half, len(ids) - 1 - half)], first=1))
                seen.computed = len(ids) - 1
                rows, wanted = [*rows, seen], [0, 1, 2, 1]
            found = torch.cat([self.forward(Plan(rows)), mixed]).float()
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"{kind} cannot be run as a batch: {type(error).__name__}: {error}") from error
        off = float((found - plain[wanted]).abs().max() / plain.abs().max())
        if not off < tolerance:  # a wrong mask or position is off by the size of the logits
            raise Unsupported(f"{kind} answers differently as a batch: its logits are off by {off:.1%}")


def _ahead(row: Row) -> int:
    """How far what follows its pictures is ahead of its place."""
    return row.given.ahead if row.given else 0


def rounds_inputs(model: Any) -> bool:
    """Whether its linear layers are on kernels that round their inputs (`swap`): small differences grow."""
    return bool(getattr(model, "rounds_inputs", False))


def _kernels_alone() -> Kernels | None:
    """The kernels, with torch's threads as their own.

    What torch is left to do is too little to share, and its threads wait in loops: where another process ran on one of
    two cores a step of 16 rows took 402 ms with them and 43 without (docs/engine-log.md).
    """
    from pipelines.engine import native

    kernels = native.load()
    if kernels and not kernels.threads:
        kernels.threads = torch.get_num_threads()
        torch.set_num_threads(1)
    return kernels
