"""The KV cache: one slot a running request, in tensors [slots, heads, length, dim] a layer, written in place.

The slots of the running requests are always the first ones, so that a batch is a view and no step copies the
cache: a slot that falls free is filled with the last one. Slots and length grow by doubling.

Knows which positions a pass writes and sees; does not know requests, sampling, nor the model that calls it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_LENGTH = 256


class Unsupported(ValueError):
    """This model's layers need a cache that slots are not."""


class Pass:
    """What the forward in progress writes: one prompt into one slot, or one token into each of some slots."""

    def __init__(self) -> None:
        self.prefill = True
        self.first = self.last = self.span = 0  # slots first … last, of which it sees `span` positions
        self.slots = self.positions = torch.empty(0, dtype=torch.long)
        self.capacity = (0, 0)  # slots, length


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values. transformers calls `update` in each attention, the rest for its masks."""

    def __init__(self, now: Pass, window: int | None) -> None:
        super().__init__()
        self.now = now
        self.window = window
        self.is_sliding = window is not None  # by this transformers finds the layer to size each mask by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write in place; answer what the pass may see: a prompt sees itself, a token all of its slot."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.now
        if now.prefill:
            self.keys[now.first, :, : now.span] = key_states[0]
            self.values[now.first, :, : now.span] = value_states[0]
            return key_states, value_states
        self.keys[now.slots, :, now.positions] = key_states[:, :, 0]
        self.values[now.slots, :, now.positions] = value_states[:, :, 0]
        rows, seen = slice(now.first, now.last), slice(now.span)
        return self.keys[rows, :, seen], self.values[rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.now.span, 0

    def get_seq_length(self) -> int:
        return 0 if self.now.prefill else self.now.span - 1

    def get_max_length(self) -> int:
        return self.now.capacity[1]

    def grow(self, rows: int, length: int) -> None:
        """To the capacity, with the first `length` positions of the first `rows` slots kept."""
        if self.is_initialized:
            self.keys = self._grown(self.keys, rows, length)
            self.values = self._grown(self.values, rows, length)

    def move(self, source: int, target: int, length: int) -> None:
        if self.is_initialized:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def clear(self) -> None:
        if self.is_initialized:
            del self.keys, self.values
            self.is_initialized = False

    def _grown(self, old: Tensor, rows: int, length: int) -> Tensor:
        slots, capacity = self.now.capacity
        if old.shape[0] >= slots and old.shape[2] >= capacity:
            return old
        new, kept = self._empty(old), old[:rows, :, :length]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
        return new

    def _empty(self, like: Tensor) -> Tensor:
        slots, length = self.now.capacity
        return _zeros((slots, like.shape[1], length, like.shape[3]), like)


class SlotCache(Cache):  # type: ignore[misc]
    """All layers' slots, in the form that transformers takes as `past_key_values`."""

    def __init__(self, config: Any, *, max_slots: int, context: int) -> None:
        self.now = Pass()
        self.windows = layer_windows(config)
        self._max_slots, self._context = max_slots, context
        super().__init__(layers=[SlotLayer(self.now, window) for window in self.windows])

    def reserve(self, slots: int, length: int, *, rows: int, used: int) -> None:
        """Grow to this many slots of this length, keeping `rows` of `used` positions. It may lack memory."""
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
                layer.grow(rows, used)
        except Exception:
            self.now.capacity = before  # what did grow is larger than it need be, and is left so
            raise

    def prefill(self, slot: int, length: int) -> None:
        """The next forward is a prompt of this length, into this slot."""
        now = self.now
        now.prefill, now.first, now.last, now.span = True, slot, slot + 1, length

    def decode(self, first: int, positions: Sequence[int], device: torch.device) -> Tensor:
        """The next forward is one token for each slot from `first`; answers their positions, [rows]."""
        now = self.now
        now.prefill, now.first, now.last, now.span = False, first, first + len(positions), max(positions) + 1
        now.slots = torch.arange(now.first, now.last, device=device)
        now.positions = torch.tensor(positions, device=device)
        return now.positions

    def masks(self, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What each row of the decode may see, added to its scores: one mask, or one for each kind."""
        window = next((window for window in self.windows if window is not None), None)
        if None not in self.windows:
            return self._mask(dtype, window)
        if window is None:
            return self._mask(dtype, None)
        return {"full_attention": self._mask(dtype, None), "sliding_attention": self._mask(dtype, window)}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot over another."""
        for layer in self.layers:
            layer.move(source, target, length)

    def clear(self) -> None:
        """Give the memory back; nothing is kept."""
        self.now.capacity = (0, 0)
        for layer in self.layers:
            layer.clear()

    def _mask(self, dtype: torch.dtype, window: int | None) -> Tensor:
        position = self.now.positions[:, None]
        seen = torch.arange(self.now.span, device=position.device)[None, :]
        hidden = seen > position
        if window is not None:
            hidden |= seen <= position - window  # as transformers.masking_utils.sliding_window_overlay
        mask = torch.zeros(hidden.shape, dtype=dtype, device=position.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None, :]


def layer_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window, None for full attention; read as transformers' DynamicCache does."""
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{config.model_type} is an encoder and a decoder; only decoders can be served")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is not None:
        kinds = set(config.layer_types)
    elif getattr(config, "attention_chunk_size", None) is not None:
        kinds = {"chunked_attention"}
    else:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        kinds |= {"shared"}
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise Unsupported(f"{config.model_type} has layers that slots cannot cache: {', '.join(other)}")
    kind_of = getattr(config, "layer_types", None) or list(kinds) * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kind_of]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, because what no mask lets through is still multiplied by 0, and 0 · NaN is NaN.

    On a CPU straight from the kernel, which gives a page when it is first written: torch.zeros writes all,
    and a cache sized by its longest request is mostly unused.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
