"""Attention of rows to slots of cached keys and values, on the native kernels.

A row is a token: of a running request, or one of a prompt's. Rows that follow one another in a slot, as a prompt's do,
share its reading; the result of each has the same bits alone or with others. Knows tensors; knows no request and no
model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.engine.native import Kernels

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def attend(
    kernels: Kernels,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """[rows, heads, dim] float32, of `queries` of that shape.

    `keys` and `values` are [slots, kv heads, length, dim] of float32, float16 or bfloat16, alike in strides. Row r sees
    positions 0 … positions[r] of slots[r], both int64, of these the last `window` if that is not 0: its own key and
    value are written already. `softcap`, if not 0, bounds the scores.
    """
    rows, heads, dim = queries.shape
    if queries.dtype != torch.float32 or keys.dtype not in _KINDS or values.dtype != keys.dtype:
        raise TypeError(f"queries are {queries.dtype}, keys {keys.dtype} and values {values.dtype}")
    if keys.stride() != values.stride() or keys.shape != values.shape or keys.stride(3) != 1 or keys.shape[3] != dim:
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not alike, or not by dim")
    if not slots.dtype == positions.dtype == torch.int64 or not len(slots) == len(positions) == rows:
        raise ValueError(f"slots and positions must be {rows} of int64")
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    slots, positions, out = slots.contiguous(), positions.contiguous(), torch.empty(rows, heads, dim)
    kernels.attention(
        *(queries.data_ptr(), queries.stride(0), queries.stride(1)),
        *(keys.data_ptr(), values.data_ptr()),
        *(_KINDS[keys.dtype], keys.stride(0), keys.stride(1), keys.stride(2)),
        *(slots.data_ptr(), positions.data_ptr(), rows, heads, keys.shape[1], dim, window, scale, softcap),
        *(out.data_ptr(), kernels.threads or torch.get_num_threads()),
    )
    return out
