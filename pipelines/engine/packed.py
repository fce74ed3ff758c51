"""Linear layers that compute on GGUF's 4- and 8-bit codes as they are stored, for a CPU.

A decode step reads every weight once, so it takes as long as the weights are large. Knows blocks and products; does
not know files, the model's names, nor which layers are swapped (`pipelines.engine.weights`).

Exact: every code, and that a weight is scale · value + base in groups of 32. Not exact: GGUF's float16 scale and base
are rounded to bfloat16, which the kernel asks for, and the products as bfloat16 rounds them. A weight is so off by
2^-7 of the largest of its group at most, where a dequantised one is off by 2^-9 of itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipelines.engine.codes import GROUP, Codes

Array = np.ndarray[Any, np.dtype[Any]]

_ROWS = 16  # the kernel takes multiples of as many
_PART = 4096  # rows packed at once: the codes are 4 bytes each on their way

# From this many inputs on, a product dequantises its weights first. Measured on SmolLM2's layers, one thread: the
# 4-bit kernel takes 2.5 ms an input; dequantising takes 53 ms, and the product then 1 ms (docs/engine-log.md).
_MANY = 40
_MANY_TIED = 10  # the same where the dequantised weight is there already


def packable(rows: int) -> bool:
    """Whether a weight of so many rows can be a `PackedLinear`."""
    return rows % _ROWS == 0


def fast_here() -> bool:
    """Without AVX-512 torch multiplies bfloat16 by converting it, and is slower than in float32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


class PackedLinear(nn.Module):
    """`nn.Linear` on codes; takes bfloat16. `tied` is the embedding's weight, dequantised, where that is the same.

    Few inputs go through the 4-bit kernel, twice for 8-bit codes: their upper and lower halves are a matrix each.
    Many go through a product in bfloat16, with `tied` or else with the weight dequantised for this product: for that
    the codes are kept a second time, column by column.

    A row of the output depends on its own input alone; on the number of inputs only as rounding does.
    """

    def __init__(self, found: Codes, *, bias: Tensor | None = None, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(found.values), found.values.shape[1] * GROUP
        # Attributes and not buffers: `model.to` must not convert them, and 210 layers look them up at each step.
        self.packed = [pack(half) for half in halves(found)]
        self.columns = _by_column(found) if tied is None else None
        self.bias = bias.detach() if bias is not None else None
        self.weight = tied
        self.many = (_MANY if tied is None else _MANY_TIED) // len(self.packed)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.in_features)
        if len(flat) >= self.many:
            return linear(inputs, self.dequantised(), self.bias)
        products = [torch._weight_int4pack_mm_for_cpu(flat, codes, GROUP, scales) for codes, scales in self.packed]
        found = products[0] if len(products) == 1 else products[0] + products[1]
        if self.bias is not None:
            found = found + self.bias
        return found.view(*inputs.shape[:-1], self.out_features)

    def dequantised(self) -> Tensor:
        """The weight in bfloat16, [N, K]."""
        if self.weight is not None:
            return self.weight
        assert self.columns is not None
        # Of 8-bit codes the lower half has the scale; its base is no more than what centres it.
        scale, base = self.packed[-1][1][..., 0].contiguous(), self.packed[0][1][..., 1].contiguous()
        return _dequantise(self.columns, scale, base)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={4 * len(self.packed)}"


def halves(found: Codes) -> list[Codes]:
    """4-bit codes whose products add up: an 8-bit value is 16 · upper + lower, lower from 0 to 15, kept less 8."""
    if found.bits == 4:
        return [found]
    upper = Codes(4, found.values >> 4, found.scale * 16, found.base)
    return [upper, Codes(4, (found.values & 15) - 8, found.scale, found.scale * 8)]


def pack(found: Codes) -> tuple[Tensor, Tensor]:
    """4-bit codes as `_weight_int4pack_mm_for_cpu` takes them: nibbles in its order, and [K / 32, N, scale and base].

    Packed by parts, which is the same: the kernel's blocks are of 64 rows.
    """
    parts = (found.values[at : at + _PART] for at in range(0, len(found.values), _PART))
    packed = [torch._convert_weight_to_int4pack_for_cpu(_nibbles(part), 1) for part in parts]
    scales = torch.from_numpy(np.stack([found.scale.T, found.base.T], -1)).bfloat16()
    return torch.cat(packed), scales.contiguous()  # numpy keeps the order of what it stacks; the kernel asks for none


def _nibbles(values: Array) -> Tensor:
    """The kernel's codes are 0 to 15, of which it subtracts 8."""
    return (torch.from_numpy(values).int() + 8).view(len(values), -1)


def _by_column(found: Codes) -> Tensor:
    """Codes as `_dequantise` takes them, int8: [K / 32, 32, N], or [K / 32, 16, N] with two 4-bit ones in each."""
    values = found.values
    if found.bits == 4:
        values = values[..., : GROUP // 2] & 15 | values[..., GROUP // 2 :] << 4
    return torch.from_numpy(values.transpose(1, 2, 0).copy())


def _dequantise(columns: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """Columns first, so that neighbours in memory have scales of their own: three times as fast as rows first."""
    groups, stored, rows = columns.shape
    if stored == GROUP:
        values = columns.bfloat16()
    else:
        values = torch.empty(groups, GROUP, rows, dtype=torch.bfloat16)
        values[:, :stored] = columns << 4 >> 4  # the lower nibble, with its sign
        values[:, stored:] = columns >> 4
    torch.addcmul(base[:, None], values, scale[:, None], out=values)
    return values.view(groups * GROUP, rows).t()
