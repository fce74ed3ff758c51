"""Layers on the native kernels: linear and embedding, on codes as `pipelines.engine.codes` has them.

float32 in and out; inputs are rounded to 16 bits with a scale for every 32, weights not at all. A row of the output has
the same bits whatever rows are beside it. Knows products; does not know which layers are swapped (`weights`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.engine.codes import GROUP, Array, Codes
from pipelines.engine.native import Kernels

_LANES = 16  # rows of a weight that are side by side in memory
_LARGEST = 13  # the power of two below which scales are brought, so that float16 rounds small ones as large


class NativeWeight:
    """Codes in the kernels' order, 64 bytes at a time: four columns of sixteen rows. The last rows may be padding."""

    def __init__(self, found: Codes) -> None:
        self.bits = found.bits
        self.rows, self.groups = found.scale.shape
        self.codes = _aligned(_interleaved(found.values, found.bits))
        largest = max(float(np.abs(found.scale).max()), float(np.abs(found.base).max()))
        power = _LARGEST - math.frexp(largest)[1] if largest > 0 else 0
        self.gain = 2.0**-power
        self.scale = _aligned(_by_block(found.scale * np.float32(2.0**power)))
        self.base = _aligned(_by_block(found.base * np.float32(2.0**power))) if found.base.any() else None

    @property
    def columns(self) -> int:
        return self.groups * GROUP

    @property
    def pointers(self) -> tuple[int, int, int | None, float]:
        """As the kernels take them. They live as long as this does."""
        base = None if self.base is None else self.base.data_ptr()
        return self.codes.data_ptr(), self.scale.data_ptr(), base, self.gain


class NativeLinear(nn.Module):
    """`nn.Linear` on codes."""

    def __init__(self, kernels: Kernels, weight: NativeWeight, *, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.columns, weight.rows
        # Attributes and not buffers: `model.to` must not convert them, and 210 layers look them up at each step.
        self.native = weight
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self._kernels, self._product = kernels, kernels.linear
        added = None if self.bias is None else self.bias.data_ptr()
        self._weight = (*weight.pointers, added, weight.bits, weight.groups, weight.rows)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = _rows_of(inputs, self.in_features)
        out = torch.empty((*inputs.shape[:-1], self.out_features))
        at, stride, into = flat.data_ptr(), flat.stride(0), out.data_ptr()
        self._product(at, len(flat), stride, *self._weight, into, self.out_features, _threads(self._kernels))
        return out

    def __reduce__(self) -> Any:  # addresses mean nothing elsewhere
        return partial(NativeLinear, bias=self.bias), (self._kernels, self.native)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.native.bits}"


class NativeEmbedding(nn.Module):
    """`nn.Embedding` on codes, which a head may share. `factor` is what some models multiply it by."""

    def __init__(self, kernels: Kernels, weight: NativeWeight, *, factor: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.rows, weight.columns
        self.native = weight
        self.factor = factor
        self._kernels, self._rows = kernels, kernels.rows
        codes, scale, base, gain = weight.pointers
        self._weight = (codes, scale, base, gain * factor, weight.bits, weight.groups, weight.rows)

    def forward(self, ids: Tensor) -> Tensor:
        wanted = ids.to(torch.int64).contiguous()
        out = torch.empty((*ids.shape, self.embedding_dim))
        if self._rows(wanted.data_ptr(), wanted.numel(), *self._weight, out.data_ptr(), _threads(self._kernels)):
            raise IndexError(f"token ids must be from 0 to {self.num_embeddings - 1}")
        return out

    def __reduce__(self) -> Any:
        return partial(NativeEmbedding, factor=self.factor), (self._kernels, self.native)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.native.bits}"


class NativeNorm(nn.Module):
    """A root mean square norm: `added` is what some models add to its weight when they run, 1 or 0."""

    def __init__(self, kernels: Kernels, weight: nn.Parameter, *, epsilon: float, added: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.added = weight, epsilon, added
        self._kernels, self._norm, self._width = kernels, kernels.rms_norm, weight.shape[0]
        self._read = weight.detach().float().contiguous()  # the same memory, which so outlives the parameter
        self._weight = (self._read.data_ptr(), added, epsilon, self._width)

    def forward(self, inputs: Tensor) -> Tensor:
        flat, out = _rows_of(inputs, self._width), torch.empty(inputs.shape)
        into = out.data_ptr()
        self._norm(flat.data_ptr(), len(flat), flat.stride(0), *self._weight, into, _threads(self._kernels))
        return out

    def __reduce__(self) -> Any:
        return partial(NativeNorm, epsilon=self.epsilon, added=self.added), (self._kernels, self.weight)

    def extra_repr(self) -> str:
        return f"{self._width}, epsilon={self.epsilon}, added={self.added}"


class Joined:
    """Several linear layers of one input, such as a query's, key's and value's, as one product.

    The first that is called computes all; the others, called with the very same tensor, take what is theirs.
    """

    def __init__(self, whole: NativeLinear, sizes: Sequence[int]) -> None:
        self.whole, self._sizes = whole, list(sizes)
        self._inputs: Tensor | None = None
        self._found: list[Tensor | None] = []

    @property
    def parts(self) -> list[JoinedPart]:
        return [JoinedPart(self, at, self.whole.in_features, size) for at, size in enumerate(self._sizes)]

    def take(self, inputs: Tensor, at: int) -> Tensor:
        found = self._found[at] if inputs is self._inputs else None
        if found is None:
            self._inputs, self._found = inputs, list(self.whole(inputs).split(self._sizes, -1))
            found = self._found[at]
        assert found is not None
        self._found[at] = None  # once each: what nobody will ask for again is not kept
        if not any(part is not None for part in self._found):
            self._inputs, self._found = None, []
        return found


class JoinedPart(nn.Module):
    """One of the layers that are computed as one."""

    def __init__(self, joined: Joined, at: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.joined, self.at = joined, at

    def forward(self, inputs: Tensor) -> Tensor:
        return self.joined.take(inputs, self.at)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, part {self.at}"


def _rows_of(inputs: Tensor, columns: int) -> Tensor:
    """[rows, columns], each row's numbers side by side."""
    if inputs.dtype != torch.float32 or inputs.device.type != "cpu" or inputs.shape[-1] != columns:
        raise TypeError(f"float32 [..., {columns}] on the CPU is wanted, not {inputs.dtype} {tuple(inputs.shape)}")
    flat = inputs.reshape(-1, columns)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _interleaved(values: Array, bits: int) -> Array:
    """uint8 [blocks, groups, 4 or 8, 16, 4]; two of 4 bits in each: the first 16 columns are the lower halves."""
    rows, groups, _ = values.shape
    blocks = -(-rows // _LANES)
    unsigned: Array = np.zeros((blocks * _LANES, groups, GROUP), np.uint8)
    unsigned[:rows] = values.view(np.uint8) + np.uint8(8 if bits == 4 else 128)  # modulo 256
    if bits == 4:
        unsigned = unsigned[..., : GROUP // 2] | unsigned[..., GROUP // 2 :] << 4
    return unsigned.reshape(blocks, _LANES, groups, -1, 4).transpose(0, 2, 3, 1, 4)


def _by_block(scales: Array) -> Array:
    """float16 [blocks, groups, 16]."""
    rows, groups = scales.shape
    blocks = -(-rows // _LANES)
    found: Array = np.zeros((blocks * _LANES, groups), np.float16)
    found[:rows] = scales
    return found.reshape(blocks, _LANES, groups).transpose(0, 2, 1)


def _aligned(array: Array) -> Tensor:
    """In memory of torch's, which begins at a cache line; numpy's does not."""
    return torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype).copy_(torch.from_numpy(array))


def _threads(kernels: Kernels) -> int:
    return kernels.threads or torch.get_num_threads()
