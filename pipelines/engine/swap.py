"""Puts layers that compute on codes in place of a model's own: on the native kernels, or on torch's 4-bit one.

Knows modules and their names; does not know files. What the codes are is asked a layer at a time, when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.engine import native
from pipelines.engine.codes import GROUP, Codes
from pipelines.engine.native_layers import Joined, NativeEmbedding, NativeLinear, NativeNorm, NativeWeight
from pipelines.engine.packed import PackedLinear, fast_here, packable

Linears: TypeAlias = Mapping[str, Callable[[], Codes]]  # by the name of the module

# Layers of one parent that transformers' models call with the same tensor.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Swap(Protocol):
    """A kind of layers on codes."""

    dtype: torch.dtype  # of the model around them
    rounds: bool  # whether what is not made of such codes is worth rounding to them

    def takes(self, rows: int, columns: int) -> bool:
        """Whether a weight of this shape can be such a layer."""

    def swaps_embedding(self, model: Any) -> bool:
        """Whether the embedding can be one as well, so that no dequantised copy of it is wanted."""

    def put(self, model: Any, linears: Linears) -> None: ...

    def put_embedding(self, model: Any, found: Codes, *, tied: bool) -> None:
        """The embedding's codes, and the head's where it is `tied`."""


def swap_here() -> Swap | None:
    """The best that this processor runs."""
    if kernels := native.load():
        return Native(kernels)
    return Packed() if fast_here() else None


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """Those that compute what a linear layer does, by name: a subclass may do more."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


class Native:
    """The kernels of `pipelines.engine.native`, in a model of float32."""

    dtype = torch.float32
    rounds = True

    def __init__(self, kernels: native.Kernels) -> None:
        self._kernels = kernels

    def takes(self, rows: int, columns: int) -> bool:
        return columns % GROUP == 0

    def swaps_embedding(self, model: Any) -> bool:
        return _factor(model.get_input_embeddings()) is not None

    def put(self, model: Any, linears: Linears) -> None:
        for names in _siblings(linears):
            found = {name: linears[name]() for name in names}
            for alike in _alike(model, found):
                biases = [model.get_submodule(name).bias for name in alike]
                layers = self._layers([found[name] for name in alike], biases)
                for name, layer in zip(alike, layers, strict=True):
                    model.set_submodule(name, layer)
        # Two ways of computing the same are as far apart as its inputs are rounded: an engine that compares asks this.
        model.rounds_inputs = True
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm") and (norm := self._norm(module)):
                model.set_submodule(name, norm)

    @torch.inference_mode()
    def _norm(self, module: nn.Module) -> NativeNorm | None:
        """The same norm, or None of one that computes something else: tried, since transformers has many."""
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float):
            return None
        inputs = torch.sin(torch.arange(3 * len(weight)).float()).view(3, -1)
        wanted = module(inputs)
        for added in (0.0, 1.0):
            norm = NativeNorm(self._kernels, weight, epsilon=epsilon, added=added)
            if torch.allclose(norm(inputs), wanted, rtol=1e-4, atol=1e-6):
                return norm
        return None

    def _layers(self, parts: list[Codes], biases: list[Tensor | None]) -> Sequence[nn.Module]:
        given = [bias for bias in biases if bias is not None]
        values, scale, base = (np.concatenate(each) for each in list(zip(*parts, strict=True))[1:])
        weight = NativeWeight(Codes(parts[0].bits, values, scale, base))
        layer = NativeLinear(self._kernels, weight, bias=torch.cat(given) if given else None)
        return [layer] if len(parts) == 1 else Joined(layer, [len(part.values) for part in parts]).parts

    def put_embedding(self, model: Any, found: Codes, *, tied: bool) -> None:
        weight, factor = NativeWeight(found), _factor(model.get_input_embeddings())
        assert factor is not None
        model.set_input_embeddings(NativeEmbedding(self._kernels, weight, factor=factor))
        if tied:
            model.set_output_embeddings(NativeLinear(self._kernels, weight))


class Packed:
    """torch's 4-bit kernel, in a model of bfloat16."""

    dtype = torch.bfloat16
    rounds = False

    def takes(self, rows: int, columns: int) -> bool:
        return columns % GROUP == 0 and packable(rows)

    def swaps_embedding(self, model: Any) -> bool:
        return False

    def put(self, model: Any, linears: Linears) -> None:
        for name, codes in linears.items():
            model.set_submodule(name, PackedLinear(codes(), bias=model.get_submodule(name).bias))

    def put_embedding(self, model: Any, found: Codes, *, tied: bool) -> None:
        if tied:
            embedding = model.get_input_embeddings().weight
            model.set_output_embeddings(PackedLinear(found, tied=embedding))


def _siblings(names: Iterable[str]) -> Iterator[list[str]]:
    """The names, those together whose layers may be one product."""
    left = dict.fromkeys(names)
    while left:
        parent, _, child = next(iter(left)).rpartition(".")
        family = next((family for family in _JOINED if child in family), (child,))
        found = [name for name in (f"{parent}.{member}".lstrip(".") for member in family) if name in left]
        for name in found:
            del left[name]
        yield found


def _alike(model: Any, found: Mapping[str, Codes]) -> list[list[str]]:
    """Of one size of codes and of inputs, with a bias each or none."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, codes in found.items():
        kind = codes.bits, codes.scale.shape[1], model.get_submodule(name).bias is None
        kinds.setdefault(kind, []).append(name)
    return list(kinds.values())


def _factor(embedding: nn.Module) -> float | None:
    """What a looked-up row is multiplied by; None of a class that may do something else."""
    if type(embedding) is nn.Embedding:
        return 1.0
    factor = getattr(embedding, "scalar_embed_scale", None)
    alone = isinstance(embedding, nn.Embedding) and len(list(embedding.parameters())) == 1
    return float(factor) if alone and factor is not None else None
