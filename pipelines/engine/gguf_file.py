"""A GGUF file's tensors, by name. The `gguf` package knows its blocks and names; this reads its header.

gguf.GGUFReader makes several arrays of every entry of the vocabulary: 2.2 s for 49,000 tokens, and it
is not the vocabulary that is wanted here. Knows no torch and no model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize

Array = np.ndarray[Any, np.dtype[Any]]

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: gguf_metadata_value_type, by number
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_PART = 1 << 18  # elements dequantised at once


class GgufFile:
    """`tensors` maps each stored name to its type, its shape (rows first, as numpy has it) and its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: Array = np.memmap(path, mode="r")
        header = _Header(self._data)
        self.fields, self.tensors = header.fields, header.tensors
        self.architecture = str(self.fields.get("general.architecture", "unknown"))
        alignment = int(self.fields.get("general.alignment", _ALIGNMENT))
        self._start = -(-header.offset // alignment) * alignment

    def names_of(self, parameters: Iterable[str], layers: int) -> dict[str, str]:
        """The stored name of each transformers parameter: one that no tensor has, where GGUF has no name."""
        architecture = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == self.architecture)
        known_names = get_tensor_name_map(architecture, layers)
        stems = {name: name.rpartition(".") for name in parameters}
        return {name: f"{known_names.get_name(stem)}.{suffix}" for name, (stem, _, suffix) in stems.items()}

    def rows(self, name: str) -> Array:
        """One tensor's blocks as they are stored, [..., bytes a row]: a view of the file."""
        kind, shape, offset = self.tensors[name]
        block, size = GGML_QUANT_SIZES[kind]
        start, row = self._start + offset, shape[-1] // block * size
        return self._data[start : start + math.prod(shape[:-1]) * row].reshape(*shape[:-1], row)

    def read(self, name: str, pool: Executor) -> Array:
        """One tensor, dequantised to float32 in parts that stay in the processor's cache, on several threads."""
        kind, shape, _ = self.tensors[name]
        block, size = GGML_QUANT_SIZES[kind]
        blocks, step = math.prod(shape) // block, max(1, _PART // block)
        stored = self.rows(name).reshape(blocks, size)
        found = np.empty((blocks, block), np.float32)

        def fill(at: int) -> None:
            # As one long row: dequantize goes by 16 rows at a time, which is slow for short ones.
            part = stored[at : at + step].reshape(1, -1)
            found[at : at + step] = dequantize(part, kind).reshape(-1, block)

        list(pool.map(fill, range(0, blocks, step)))
        return found.reshape(shape)


class _Header:
    """Reads from the file's start: the fields (arrays are stepped over), then where each tensor is."""

    def __init__(self, data: Array) -> None:
        self._data = memoryview(data)  # type: ignore[arg-type]  # numpy 1 does not say that it is a Buffer
        self.offset = 0
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"not a GGUF file of version 2 or 3, but {magic!r} version {version}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._take("<I")[0])
        self.tensors = dict(self._tensor() for _ in range(tensors))

    def _tensor(self) -> tuple[str, tuple[GGMLQuantizationType, tuple[int, ...], int]]:
        name = self._string()
        sizes = self._take(f"<{self._take('<I')[0]}Q")
        kind, offset = self._take("<IQ")
        return name, (GGMLQuantizationType(kind), tuple(reversed(sizes)), offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._skip_array()
        return self._take("<" + _SCALARS[kind])[0]

    def _skip_array(self) -> None:
        kind, count = self._take("<IQ")
        if kind in _SCALARS:
            self.offset += count * struct.calcsize("<" + _SCALARS[kind])
        elif kind == _STRING:
            unpack, data, offset = struct.Struct("<Q").unpack_from, self._data, self.offset
            for _ in range(count):
                offset += 8 + unpack(data, offset)[0]
            self.offset = offset
        else:
            for _ in range(count):
                self._value(kind)

    def _string(self) -> str:
        length = self._take("<Q")[0]
        self.offset += length
        return bytes(self._data[self.offset - length : self.offset]).decode("utf-8")

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._data, self.offset)
        self.offset += struct.calcsize(form)
        return found
