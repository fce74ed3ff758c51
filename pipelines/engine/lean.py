"""Imports torch, and what models of transformers are made of, without what only tracing, training and compiling need.

torch imports how operators are traced, in Python, and its exporter: 0.9 of its 2.5 s. The models' modules import its
compiler, for decorators that do nothing unless it runs, tensors that are laid over several machines, and a second index
of the files of all 500 models. None of it is used where a model only runs. Here placeholders stand for it while the
modules are imported, and are gone afterwards: whoever asks for the compiler, or for another model, then gets all of it.
Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_COMPILER, _WRAPPED = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
_TRACING = ("torch._meta_registrations", "torch.export")
_KNOWN_TORCH = "2.13."  # an import that fails halfway cannot be begun again, so nothing is tried with another
_SHARED = ("transformers.modeling_utils", "transformers.modeling_layers", "transformers.generation.utils")


def import_torch() -> None:
    """Enough of it to run a model that is there as it is in memory: no tensor without data ("meta"), and no tracing.

    For more than that there is `complete_torch`.
    """
    if "torch" in sys.modules or not importlib.metadata.version("torch").startswith(_KNOWN_TORCH):
        return
    standing = {name: ModuleType(name) for name in _TRACING}
    sys.modules.update(standing)
    try:
        torch = importlib.import_module("torch")
    finally:
        for name in _TRACING:
            del sys.modules[name]
    for name in _TRACING:
        vars(torch).pop(name.removeprefix("torch."), None)


def complete_torch() -> None:
    """The rest of it, if that is missing."""
    for name in _TRACING:
        importlib.import_module(name)


def import_transformers(*models: str) -> None:
    """The modules that all models share, and those of these models, by their full names.

    At once where they are there already; as a whole, which takes longer, where it does not work this way.
    """
    missing = [name for name in (*_SHARED, *models) if name not in sys.modules]
    if _COMPILER in sys.modules or not missing:
        return
    try:
        with _placeholders():
            for name in missing:
                importlib.import_module(name)
    except Exception as error:  # other versions, with other needs
        log.warning("transformers is imported as a whole: %s: %s", type(error).__name__, error)


@contextmanager
def _placeholders() -> Iterator[None]:
    import torch.distributed

    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    models = ModuleType("transformers.models")
    models.__path__ = [str(Path(found.origin).parent / "models")]
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False  # asked once, and remembered
    try:
        with without_compiler(), _standing_in(models):
            yield
    finally:
        torch.distributed.is_available = available


@contextmanager
def without_compiler() -> Iterator[None]:
    """torch's compiler is not imported, which takes 3 s, by what only asks that it let something be.

    Making a model without data does: its first values are drawn by operators that are written in Python.
    """
    compiler, wrapped = ModuleType(_COMPILER), ModuleType(_WRAPPED)
    compiler.__path__ = []
    for name in ("disable", "assume_constant_result", "allow_in_graph"):
        setattr(compiler, name, _undecorated)
    wrapped.TransformGetItemToIndex = _transform  # type: ignore[attr-defined]
    with _standing_in(compiler, wrapped):
        yield


@contextmanager
def _standing_in(*modules: ModuleType) -> Iterator[None]:
    """Each in its own's place, if that has not been imported."""
    standing = {module.__name__: module for module in modules if module.__name__ not in sys.modules}
    sys.modules.update(standing)
    try:
        yield
    finally:
        for name, module in standing.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator for the compiler, with arguments or without."""
    return _same if function is None else function


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _transform() -> Any:
    """What some masks are made within: the compiler's own, once it is asked for."""
    return importlib.import_module(_WRAPPED).TransformGetItemToIndex()
