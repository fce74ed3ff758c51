"""The KV cache: a slot for each request, in tensors [slots, heads, length, dim] a layer, written in place.

A pass is flat: one token for each of the first slots, and chunks of prompts, each into its slot. The layers write what
they are given; `attention` reads what each token may see. Slots and length grow by doubling. On a CPU memory is taken
page by page as it is written, and given back where a slot became shorter.

Knows which positions a pass writes; does not know requests, sampling, nor the model that calls it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from pipelines.engine.native import Kernels

FIRST_LENGTH = 256
_LIBC = ctypes.CDLL(None, use_errno=True)


class Unsupported(ValueError):
    """This model's layers need a cache that slots are not, or attention that `attention` does not do."""


class Span(NamedTuple):
    """Positions start … start + length of one slot."""

    slot: int
    start: int
    length: int


class Pass:
    """What the forward in progress is of: a token at `positions` of slots first … last, then chunks."""

    def __init__(self) -> None:
        self.first = self.last = self.span = 0  # of those slots `span` positions are seen
        self.slots = self.positions = torch.empty(0, dtype=torch.long)
        self.chunks: Sequence[Span] = ()
        # Of every token, chunks' too: its slot and its position there, for kernels that go by these alone.
        self.all_slots = self.all_positions = self.slots
        self.masks: dict[Any, Tensor | None] = {}  # made once a pass, for all layers that need the same
        self.capacity = (0, 0)  # slots, length


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values. transformers calls `update` in each attention."""

    def __init__(self, now: Pass, window: int | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.now = now
        self.window = window
        self.kept_as = dtype
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [1, heads, tokens, dim] in place. Answers the same: attention reads the cache itself."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            self._write(stored, states[0])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.now.capacity[1]

    def grow(self, rows: int, length: int) -> None:
        """To the capacity, with the first `length` positions of the first `rows` slots kept."""
        if self.is_initialized:
            self.keys = self._grown(self.keys, rows, length)
            self.values = self._grown(self.values, rows, length)

    def copy(self, source: int, target: int, length: int) -> None:
        if self.is_initialized:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        if self.is_initialized:
            for stored in (self.keys, self.values):
                before = stored[one, :, :length].clone()
                stored[one, :, :length] = stored[other, :, :length]
                stored[other, :, :length] = before

    def clear(self) -> None:
        """Back to no slot, of the shape and type that it had: a compiled step writes into it without `update`."""
        if self.is_initialized:
            self.keys, self.values = (
                stored.new_empty((0, stored.shape[1], 0, stored.shape[3])) for stored in (self.keys, self.values)
            )

    def _write(self, stored: Tensor, states: Tensor) -> None:
        now, states = self.now, states.to(stored.dtype)
        decoded = now.last - now.first
        if decoded:
            stored[now.slots, :, now.positions] = states[:, :decoded].transpose(0, 1)
        at = decoded
        for chunk in now.chunks:
            stored[chunk.slot, :, chunk.start : chunk.start + chunk.length] = states[:, at : at + chunk.length]
            at += chunk.length

    def _grown(self, old: Tensor, rows: int, length: int) -> Tensor:
        slots, capacity = self.now.capacity
        if old.shape[0] >= slots and old.shape[2] >= capacity:
            return old
        new, kept = self._empty(old), old[:rows, :, :length]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
        return new

    def _empty(self, like: Tensor) -> Tensor:
        slots, length = self.now.capacity
        return zeros((slots, like.shape[1], length, like.shape[3]), self.kept_as or like.dtype, like.device)


class SlotCache(Cache):  # type: ignore[misc]
    """All layers' slots, in the form that transformers takes a cache in.

    `dtype` is what keys and values are kept as; None is what the model computes in. `kernels` are what attention over
    it is computed by, if not by torch.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_slots: int,
        context: int,
        dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.now = Pass()
        self.kernels = kernels
        self.windows = layer_windows(config)
        self.sources = layer_sources(config)
        self._max_slots, self._context = max_slots, context
        self._touched: dict[int, int] = {}  # how many positions of each slot have memory
        super().__init__(layers=[SlotLayer(self.now, window, dtype) for window in self.windows])

    @property
    def shares(self) -> bool:
        """Whether some layers have none of their own."""
        return len(set(self.sources)) < len(self.sources)

    def read_by(self, layer: Any) -> SlotLayer:
        """What this layer attends over."""
        found: SlotLayer = self.layers[self.sources[layer]]
        return found

    def reserve(self, slots: int, length: int) -> None:
        """Grow to this many slots of this length. It may lack memory."""
        have_slots, have_length = before = self.now.capacity
        if slots > have_slots:
            have_slots = max(slots, min(self._max_slots, 2 * have_slots))
        if length > have_length:
            have_length = max(length, min(self._context, max(2 * have_length, FIRST_LENGTH)))
        if (have_slots, have_length) == before:
            return
        self.now.capacity = (have_slots, have_length)
        try:
            for layer in self.layers:
                layer.grow(max(self._touched, default=-1) + 1, max(self._touched.values(), default=0))
        except Exception:
            self.now.capacity = before  # what did grow is larger than it need be, and is left so
            raise

    def begin(self, first: int, positions: Sequence[int], chunks: Sequence[Span], device: torch.device) -> None:
        """The next forward is of these tokens: one for each slot from `first`, then the chunks."""
        now = self.now
        now.first, now.last, now.span = first, first + len(positions), max(positions, default=-1) + 1
        now.chunks = chunks
        now.masks = {}
        ends = [chunk.start + chunk.length for chunk in chunks]
        slots = max([now.last, *(chunk.slot + 1 for chunk in chunks)])
        self.reserve(slots, max([now.span, *ends]))
        slot_of = [*range(now.first, now.last)]
        place_of = [*positions]
        for chunk, end in zip(chunks, ends, strict=True):
            slot_of += [chunk.slot] * chunk.length
            place_of += range(chunk.start, end)
        now.all_slots = torch.tensor(slot_of, dtype=torch.long, device=device)
        now.all_positions = torch.tensor(place_of, dtype=torch.long, device=device)
        now.slots, now.positions = now.all_slots[: len(positions)], now.all_positions[: len(positions)]
        self.touch(positions, first)
        for chunk, end in zip(chunks, ends, strict=True):
            self._touch(chunk.slot, end)

    def begin_rounded(self, rows: int, span: int, slots: Tensor, positions: Tensor) -> None:
        """The next forward is one token a row, as `graphs` runs it: what these tensors hold then says where."""
        now = self.now
        now.first, now.last, now.span, now.chunks, now.masks = 0, rows, span, (), {}
        now.slots, now.positions = slots, positions

    def spare(self, rows: int, length: int) -> int:
        """Make place for so many rows of this length, and for a slot besides that nobody uses: this one."""
        self.reserve(max(rows, max(self._touched, default=-1) + 1) + 1, length)
        return self.now.capacity[0] - 1

    def copy(self, source: int, target: int, length: int) -> None:
        """The first positions of a slot over those of another."""
        self.reserve(target + 1, length)
        self._touch(target, length)
        for layer in self.layers:
            layer.copy(source, target, length)

    def swap(self, one: int, other: int, length: int) -> None:
        self.reserve(max(one, other) + 1, length)
        self._touch(one, length)
        self._touch(other, length)
        for layer in self.layers:
            layer.swap(one, other, length)

    @property
    def touched(self) -> int:
        """Positions that have memory."""
        return sum(self._touched.values())

    def trim(self, lengths: dict[int, int]) -> None:
        """Give back what slots have beyond these lengths."""
        for slot, touched in list(self._touched.items()):
            length = lengths.get(slot, 0)
            if touched > length:
                for layer in self.layers:
                    if layer.is_initialized:
                        _give_back(layer.keys, slot, length, touched)
                        _give_back(layer.values, slot, length, touched)
                self._touched[slot] = length

    def clear(self) -> None:
        """Give the memory back; nothing is kept."""
        self.now.capacity = (0, 0)
        self._touched.clear()
        for layer in self.layers:
            layer.clear()

    def touch(self, positions: Sequence[int], first: int = 0) -> None:
        """These slots, from `first`, hold something up to these positions."""
        for slot, position in enumerate(positions, first):
            self._touch(slot, position + 1)

    def _touch(self, slot: int, length: int) -> None:
        if self._touched.get(slot, 0) < length:
            self._touched[slot] = length


def cache_name(model: Any) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24; the old name goes with 5.40."""
    return "past_key_values" if "past_key_values" in signature(model.forward).parameters else "cache"


def layer_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window, None for full attention; read as transformers' DynamicCache does."""
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{config.model_type} is an encoder and a decoder")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is not None:
        kinds = set(config.layer_types)
    elif getattr(config, "attention_chunk_size", None) is not None:
        kinds = {"chunked_attention"}
    else:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise Unsupported(f"{config.model_type} has layers that slots cannot cache: {', '.join(other)}")
    kind_of = getattr(config, "layer_types", None) or list(kinds) * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kind_of]


def layer_sources(config: Any) -> list[int]:
    """The layer whose keys and values each layer reads: its own, or where layers share, the last of its kind's."""
    modes = getattr(config, "kv_sharing_modes", None) or [None] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [""] * len(modes)
    stored: dict[str, int] = {}
    sources = []
    for layer, (mode, kind) in enumerate(zip(modes, kinds, strict=True)):
        if mode == "store":
            stored[kind] = layer
        sources.append(stored.get(kind, layer) if mode == "reuse" else layer)
    return sources


def position_bytes(config: Any, dtype: torch.dtype) -> int:
    """What one position of a slot takes, all layers together, by the config. A model without attention says nothing."""
    heads: int = getattr(config, "num_attention_heads", 0)
    keys: int = getattr(config, "num_key_value_heads", None) or heads
    dim: int = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    layers = len(set(layer_sources(config)))
    return max(1, 2 * layers * keys * dim * dtype.itemsize)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because what no mask lets through is still multiplied by 0, and 0 · NaN is NaN.

    On a CPU straight from the kernel, which gives a page when it is first written: torch.zeros writes all,
    and a cache sized by its longest request is mostly unused.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _give_back(stored: Tensor, slot: int, start: int, end: int) -> None:
    """The whole pages of positions start … end of each head of a slot; they read as zeros afterwards."""
    if stored.device.type != "cpu":
        return
    for head in stored[slot]:
        first = -(-head[start:].data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (head.data_ptr() + head[:end].nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0 and _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise refused to give memory back")
