"""A model without its weights: enough to export it in another process, which must not need their memory.

Names every tensor of a model by where it is, so that two processes mean the same; knows no compiler.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.engine.compiled_ops import traced
from pipelines.engine.tensors import is_ours, tensors_of

# Tensors as small as these keep their values: a compiler writes small ones into the code it makes.
SMALL = 16


class Unportable(ValueError):
    """This model cannot be described to another process; the message says why."""


def dump(model: nn.Module) -> bytes:
    """The model for `restore`. Its tensors are no more than their shapes, but for small ones."""
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    file = io.BytesIO()
    try:
        _Pickler(file, names).dump(model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Unportable(f"{type(model).__name__} cannot be described to another process: {error}") from error
    return file.getvalue()


def restore(dumped: bytes) -> tuple[Any, dict[str, Tensor]]:
    """The model that was dumped, by the same code in the same installation, and its tensors by their names there.

    The large ones are empty: memory that nobody touches.
    """
    unpickler = _Unpickler(io.BytesIO(dumped))
    return unpickler.load(), unpickler.made


def describe(model: nn.Module) -> Iterator[Any]:
    """All that is traced of the model, but for what is in its large tensors: its parts, and the numbers in these."""
    for name, tensor in tensors_of(model).items():
        yield name, _describe(tensor)
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield from _numbers(path, module, seen)


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    values = tensor.flatten().tolist() if tensor.numel() <= SMALL else None
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    return kind, str(tensor.dtype), tuple(tensor.shape), tensor.stride(), values


def _numbers(place: str, value: Any, seen: set[int]) -> Iterator[Any]:
    """Of a module, or an object of this package's classes: its class and the plain values that it has."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield place, type(value).__module__, type(value).__qualname__
    for name, item in vars(value).items():
        if item is None or isinstance(item, bool | int | float | str | torch.dtype):
            yield place, name, str(item)
        elif is_ours(item):
            yield from _numbers(f"{place}.{name}", item, seen)


class _Pickler(pickle.Pickler):
    """Native layers hold addresses, which mean nothing elsewhere: what is dumped is how they are traced."""

    def __init__(self, file: io.BytesIO, names: dict[int, str]) -> None:
        super().__init__(file)
        self._names = names

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._names:
            raise Unportable(f"a tensor of {tuple(value.shape)} is where no module has it as an attribute")
        return self._names[id(value)], _describe(value)

    def reducer_override(self, value: Any) -> Any:
        return traced(value) or NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.made: dict[str, Tensor] = {}

    def persistent_load(self, wanted: Any) -> Tensor:
        name, description = wanted
        if name not in self.made:
            self.made[name] = _tensor(*description)
        return self.made[name]


def _tensor(kind: str, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], values: Any) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype.removeprefix("torch.")))
    if values is not None:
        tensor.copy_(torch.tensor(values).view(shape))
    return nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor
