"""Quantised weights as codes with a scale: as GGUF's blocks hold them, or made of a weight's numbers.

Knows blocks; does not know files, the model's names, nor who multiplies them (`packed`, `native_layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K, dequantize

Array = np.ndarray[Any, np.dtype[Any]]

GROUP = 32  # columns that share a scale: of every block type below, and a size that the kernels take

_FLOATS = (Kind.F64, Kind.F32, Kind.F16, Kind.BF16)
_PART = 1 << 20  # numbers quantised at once


class Codes(NamedTuple):
    """A weight of N rows and K columns: scale · value + base."""

    bits: int  # 4: values from -8 to 7; 8: from -128 to 127
    values: Array  # int8 [N, K / 32, 32]
    scale: Array  # float32 [N, K / 32]
    base: Array  # float32 [N, K / 32]


def exact(kind: Kind) -> bool:
    """Whether `codes` are what such blocks hold: integers with a scale, and a base, for every 32."""
    return kind in _CODES


def is_quantised(kind: Kind) -> bool:
    return kind not in _FLOATS


def codes(kind: Kind, rows: Array) -> Codes:
    """What the blocks of a weight hold; `rows` are its bytes, [N, bytes a row]."""
    shape, size = (len(rows), -1), GGML_QUANT_SIZES[kind][1]
    bits, values, scale, base = _CODES[kind](rows.reshape(-1, size))
    return Codes(bits, values.reshape(*shape, GROUP), scale.reshape(shape), base.reshape(shape))


def codes_or_nearest(kind: Kind, rows: Array) -> Codes:
    """`codes`; of blocks that are none (of 16, or with tables) 8-bit codes of what they dequantise to.

    Those are off by 2^-8 of the largest of 32 at most: a Q6_K weight is rounded four times as coarsely in its file.
    """
    return codes(kind, rows) if exact(kind) else quantised(dequantize(rows, kind), 8)


def quantised(weight: Array, bits: int) -> Codes:
    """Codes of a weight, float32 [N, K]: 8 bits are symmetric about 0, 4 go from the least to the largest of 32."""
    rows, columns = weight.shape
    groups = columns // GROUP
    values = np.empty((rows, groups, GROUP), np.int8)
    scale, base = np.empty((2, rows, groups), np.float32)
    make, step = (_signed if bits == 8 else _ranged), max(1, _PART // columns)
    for at in range(0, rows, step):
        part = slice(at, at + step)
        values[part], scale[part], base[part] = make(weight[part].reshape(-1, groups, GROUP))
    return Codes(bits, values, scale, base)


def _signed(groups: Array) -> tuple[Array, Array, Array]:
    scale = np.abs(groups).max(-1) / 127
    return _steps(groups, scale), scale, np.zeros_like(scale)


def _ranged(groups: Array) -> tuple[Array, Array, Array]:
    least = groups.min(-1)
    scale = (groups.max(-1) - least) / 15
    return _steps(groups - least[..., None], scale) - np.int8(8), scale, least + 8 * scale


def _steps(numbers: Array, scale: Array) -> Array:
    """Whole numbers of steps; of nothing but zeros, none."""
    found: Array = np.rint(numbers / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8)
    return found


def _split(blocks: Array, *sizes: int) -> list[Array]:
    """Blocks [blocks, bytes] into their fields; the last one has what is left."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _float16(field: Array) -> Array:
    return np.ascontiguousarray(field).view(np.float16).astype(np.float32)


def _low_then_high(field: Array) -> Array:
    """Nibbles of a block of 32: the lower ones are its first half."""
    values: Array = np.concatenate([field & 15, field >> 4], 1).view(np.int8)
    return values


def _q4_0(blocks: Array) -> Codes:
    scale, quants = _split(blocks, 2)
    d = _float16(scale)
    return Codes(4, _low_then_high(quants) - np.int8(8), d, np.zeros_like(d))


def _q4_1(blocks: Array) -> Codes:
    scale, least, quants = _split(blocks, 2, 2)
    d = _float16(scale)
    return Codes(4, _low_then_high(quants) - np.int8(8), d, _float16(least) + 8 * d)


def _q4_k(blocks: Array) -> Codes:
    """256 codes in 8 groups: four times 32 bytes, the lower nibbles of which are a group and the upper the next."""
    scale, scale_of_least, six_bits, quants = _split(blocks, 2, 2, Q4_K.K_SCALE_SIZE)
    scales, least = Q4_K.get_scale_min(six_bits)
    d = _float16(scale) * scales
    pairs = quants.reshape(-1, 4, 1, GROUP) >> np.array([0, 4], np.uint8)[:, None]
    values = (pairs & 15).view(np.int8) - np.int8(8)
    return Codes(4, values, d, 8 * d - _float16(scale_of_least) * least)


def _q5_0(blocks: Array) -> Codes:
    scale, fifth, quants = _split(blocks, 2, 4)
    d = _float16(scale)
    upper = np.unpackbits(fifth, axis=1, bitorder="little").view(np.int8)
    return Codes(8, (_low_then_high(quants) | upper << 4) - np.int8(16), d, np.zeros_like(d))


def _q8_0(blocks: Array) -> Codes:
    scale, quants = _split(blocks, 2)
    d = _float16(scale)
    return Codes(8, quants.view(np.int8), d, np.zeros_like(d))


_CODES: dict[Kind, Callable[[Array], Codes]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q4_K: _q4_k,
    Kind.Q5_0: _q5_0,
    Kind.Q8_0: _q8_0,
}
