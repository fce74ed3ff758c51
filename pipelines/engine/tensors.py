"""Every tensor of a model, by where it is: also those that are no parameters, such as what native layers hold.

Needs torch alone, as does whoever measures an engine on a machine with a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model, by the first place it is in."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for place, tensor in _inside(path, vars(module), seen):
            found[place] = tensor
    return found


def _inside(place: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value that were not seen: in lists, tuples, dicts, and objects of this package's classes."""
    if id(value) in seen or not (isinstance(value, Tensor | list | tuple | dict) or is_ours(value)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield place, value
        return
    named = (
        dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, dict) else vars(value)
    )
    for name, item in named.items():
        if name != "_modules":  # theirs are asked for by name
            yield from _inside(f"{place}.{name}", item, seen)


def is_ours(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == __name__.partition(".")[0] and hasattr(value, "__dict__")
