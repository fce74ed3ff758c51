"""Attention over slots: the function that transformers calls in each layer, in place of its own.

A flat pass has tokens of many requests in one row, [1, heads, tokens, dim]: first those that decode, which are a batch
over the first slots, then each prompt's chunk. Each sees its own slot up to itself, or a window of that. Knows no
scheduler; models whose attention needs more (sinks, biases) are `Unsupported`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipelines.engine import native_attention
from pipelines.engine.slots import Pass, SlotCache, SlotLayer, Span, Unsupported

NAME = "triptych"  # as transformers' configs call it: it makes no masks for an implementation it does not know
_HARMLESS = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "is_causal", "return_dict"})

_local = threading.local()


@contextmanager
def over(cache: SlotCache) -> Iterator[None]:
    """Forwards within, in this thread, attend over this cache."""
    _local.cache = cache
    try:
        yield
    finally:
        _local.cache = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim]. `key` and `value` are in the cache already."""
    cache: SlotCache | None = getattr(_local, "cache", None)
    if cache is None:  # not in a pass: layers that look at pictures and are configured as those that read text
        found = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return found.transpose(1, 2), None
    layer = cache.read_by(module.layer_idx)
    if reason := why_not(layer, attention_mask, sliding_window, others):
        raise Unsupported(reason)
    now = cache.now
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.kernels is not None:
        found = native_attention.attend(
            cache.kernels,
            query[0].transpose(0, 1),
            layer.keys,
            layer.values,
            now.all_slots,
            now.all_positions,
            scale=scale,
            window=layer.window or 0,
            softcap=softcap or 0.0,
        )
        return found[None], None
    decoded = now.last - now.first
    parts = []
    if decoded:
        parts.append(_decode(query[0, :, :decoded], layer, scale, softcap))
    at = decoded
    for chunk in now.chunks:
        parts.append(_chunk(query[:, :, at : at + chunk.length], layer, chunk, scale, softcap))
        at += chunk.length
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


AttentionInterface.register(NAME, attend)


def why_not(layer: Any, mask: Tensor | None, sliding_window: int | None, others: Mapping[str, Any]) -> str:
    """Why attention over slots cannot do what a model asks of it; empty if it can. A layer has its `window`."""
    if mask is not None or layer.window != sliding_window:
        return "its masks are of its own making"
    # Models hand on all they were called with, like a false `output_router_logits`.
    asked = (name for name, given in others.items() if given is not None and given is not False)
    extra = sorted(name for name in asked if name not in _HARMLESS)
    return f"its attention takes {', '.join(extra)}" if extra else ""


def _decode(query: Tensor, layer: SlotLayer, scale: float, softcap: float | None) -> Tensor:
    """[heads, rows, dim], each row over its slot. The heads that share a key are one query's several places."""
    now = layer.now
    heads, rows, dim = query.shape
    keys = layer.keys[now.first : now.last, :, : now.span].to(query.dtype)
    values = layer.values[now.first : now.last, :, : now.span].to(query.dtype)
    query = query.transpose(0, 1).reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
    found = _attention(query, keys, values, _decode_mask(now, layer.window, query), scale, softcap)
    return found.reshape(1, rows, heads, values.shape[-1])


def _chunk(query: Tensor, layer: SlotLayer, chunk: Span, scale: float, softcap: float | None) -> Tensor:
    """[1, heads, tokens, dim], each token over its slot up to itself."""
    end = chunk.start + chunk.length
    keys = layer.keys[chunk.slot, :, :end].to(query.dtype)[None]
    values = layer.values[chunk.slot, :, :end].to(query.dtype)[None]
    mask = _chunk_mask(layer.now, layer.window, chunk, query)
    return _attention(query, keys, values, mask, scale, softcap).transpose(1, 2)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Without a mask it is causal."""
    if softcap is None:
        shared = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(
            query, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=shared
        )
    each = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(each, 1), values.repeat_interleave(each, 1)
    scores = torch.matmul(query, keys.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = _hidden(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), query.dtype)
    return torch.matmul(torch.softmax(scores + mask, -1, dtype=torch.float32).to(query.dtype), values)


def _decode_mask(now: Pass, window: int | None, like: Tensor) -> Tensor:
    """[rows, 1, 1, span]"""
    found = now.masks.get(window)
    if found is None:
        position = now.positions[:, None]
        seen = torch.arange(now.span, device=position.device)[None, :]
        hidden = seen > position
        if window is not None:
            hidden |= seen <= position - window  # as transformers.masking_utils.sliding_window_overlay
        found = now.masks[window] = _hidden(hidden, like.dtype)[:, None, None, :]
    return found


def _chunk_mask(now: Pass, window: int | None, chunk: Span, like: Tensor) -> Tensor | None:
    """[tokens, positions], or None for a prompt's beginning that no window cuts."""
    end = chunk.start + chunk.length
    if window is not None and end <= window:
        window = None
    if chunk.start == 0 and window is None:
        return None
    key = (window, chunk)
    if key not in now.masks:
        position = torch.arange(chunk.start, end, device=like.device)[:, None]
        seen = torch.arange(end, device=like.device)[None, :]
        hidden = seen > position
        if window is not None:
            hidden |= seen <= position - window
        now.masks[key] = _hidden(hidden, like.dtype)
    return now.masks[key]


def _hidden(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
