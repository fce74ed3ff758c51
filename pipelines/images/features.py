"""What a model's processor makes of pictures, as one array of bytes that travels from preprocess to generate.

The form: a version byte, three of zero, the length of a JSON header, the header, and the buffers it places, aligned.
Knows numpy and no model: which arrays there are, and what they mean, is between a processor and its model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

_VERSION = 1
_FIXED = 8  # bytes before the header
_ALIGNMENT = 64
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_MOST = 2**31  # for a side of an array
_IDENTITY = "identity"


@dataclass(frozen=True)
class Features:
    """A prompt's pictures for its model: `arrays` as the processor names them, each with its batch dimension.

    `identity` has one number a prompt token: the token's id, or, where it stands for a picture, a negative one made
    from a digest of that picture. Prompts of the same numbers are the same to the model.
    """

    arrays: Mapping[str, Array]
    identity: list[int]


def pack(features: Features) -> NDArray[np.uint8]:
    """One copy of every array, in one buffer."""
    identity = np.array(features.identity, dtype=np.int64)
    placed: list[tuple[str, Array]] = [(_IDENTITY, identity)]
    placed += [(f"arrays.{name}", array) for name, array in features.arrays.items()]
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    end = 0
    for name, array in placed:
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} is of {array.dtype}, which does not travel; {', '.join(_DTYPES)} do")
        entries.append((name, array.dtype.name, array.shape, end))
        end = _aligned(end + array.nbytes)
    header = json.dumps(entries).encode()
    start = _aligned(_FIXED + len(header))
    packed = np.zeros(start + end, dtype=np.uint8)
    packed[0] = _VERSION
    packed[4:_FIXED] = np.frombuffer(len(header).to_bytes(4, "little"), dtype=np.uint8)
    packed[_FIXED : _FIXED + len(header)] = np.frombuffer(header, dtype=np.uint8)
    for (_, array), (_, _, shape, offset) in zip(placed, entries, strict=True):
        room = packed[start + offset : start + offset + array.nbytes]
        room.view(_DTYPES[array.dtype.name]).reshape(shape)[...] = array
    return packed


def unpack(packed: NDArray[np.uint8]) -> Features:
    """Views into `packed`, or a ValueError that says what is wrong with it."""
    if packed.dtype != np.uint8 or packed.ndim != 1 or not packed.flags.c_contiguous:
        raise ValueError("packed features are one row of bytes")
    if packed.size < _FIXED or packed[0] != _VERSION:
        raise ValueError(f"packed features begin with their version, {_VERSION}, and the length of a header")
    length = int.from_bytes(packed[4:_FIXED].tobytes(), "little")
    if _FIXED + length > packed.size:
        raise ValueError(f"packed features of {packed.size} bytes have a header of {length}")
    try:
        entries = json.loads(packed[_FIXED : _FIXED + length].tobytes())
    except (ValueError, RecursionError):
        raise ValueError("the header of packed features is not JSON") from None
    if not isinstance(entries, list):
        raise ValueError("the header of packed features is a list")
    buffers = packed[min(_aligned(_FIXED + length), packed.size) :]
    found = dict(_view(buffers, entry) for entry in entries)
    identity = found.pop(_IDENTITY, None)
    if identity is None or identity.dtype != np.int64 or identity.ndim != 1:
        raise ValueError("packed features have an identity: one int64 a token")
    return Features({name.removeprefix("arrays."): array for name, array in found.items()}, identity.tolist())


def _view(buffers: NDArray[np.uint8], entry: object) -> tuple[str, Array]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ValueError("an entry of packed features is a name, a dtype, a shape and an offset")
    name, kind, shape, offset = entry
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if not isinstance(name, str) or dtype is None or not isinstance(shape, list):
        raise ValueError("an entry of packed features has a name, a known dtype and a shape")
    if not all(type(size) is int and 0 <= size <= _MOST for size in [*shape, offset]):
        raise ValueError(f"{name} in packed features has a shape or an offset that is none")
    count = math.prod(shape)
    end = offset + count * dtype.itemsize
    if end > buffers.size or len(shape) > np.MAXDIMS:
        raise ValueError(f"{name} in packed features ends after they do")
    return name, np.frombuffer(buffers, dtype=dtype, count=count, offset=offset).reshape(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
