"""How a model is traced for a compiled step: its linear layers and its attention become one operator each.

A step is flat, as the engine's forward is: tokens of any requests in one row, each with its slot and position, over a
cache of one tensor of keys and one of values a layer. Knows how transformers calls these; does not know compilers. The
operators have no code here: a compiled step calls `shim.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from pipelines.engine.attention import why_not
from pipelines.engine.native_layers import Joined, JoinedPart, NativeEmbedding, NativeLinear, NativeNorm
from pipelines.engine.slots import cache_name, layer_windows

NAME = "triptych_step"

_library = torch.library.Library("triptych", "FRAGMENT")  # type: ignore[no-untyped-call]
_define: Callable[[str], None] = _library.define
_define(
    "step_linear(Tensor inputs, Tensor codes, Tensor scale, Tensor? base, Tensor? bias, float gain, int bits, "
    "int outputs) -> Tensor"
)
_define(
    "step_rows(Tensor ids, Tensor codes, Tensor scale, Tensor? base, float gain, int bits, int columns, "
    "int rows) -> Tensor"
)
_define(
    "step_attend(Tensor queries, Tensor keys, Tensor values, Tensor(a!) all_keys, Tensor(b!) all_values, "
    "Tensor slots, Tensor positions, float scale, float softcap, int window) -> Tensor"
)
# As compiled code calls them; the names are torch's doing.
C_FUNCTIONS = {
    torch.ops.triptych.step_linear.default: [
        "int32_t aoti_torch_cpu_step_linear(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, "
        "AtenTensorHandle*, double, int64_t, int64_t, AtenTensorHandle*)"
    ],
    torch.ops.triptych.step_rows.default: [
        "int32_t aoti_torch_cpu_step_rows(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, "
        "double, int64_t, int64_t, int64_t, AtenTensorHandle*)"
    ],
    torch.ops.triptych.step_attend.default: [
        "int32_t aoti_torch_cpu_step_attend(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double, int64_t, AtenTensorHandle*)"
    ],
}


class Untraceable(ValueError):
    """This model cannot be a compiled step; the message says why."""


def _step_linear(inputs: Tensor, *others: Any) -> Tensor:
    return inputs.new_empty(inputs.shape[0], others[-1])


def _step_rows(ids: Tensor, *others: Any) -> Tensor:
    return torch.empty(ids.shape[0], others[-2])


def _step_attend(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


for _operator in (_step_linear, _step_rows, _step_attend):
    torch.library.register_fake(f"triptych::{_operator.__name__[1:]}", _operator, lib=_library)


class TracedLinear(nn.Module):
    """A `NativeLinear` as one operator."""

    def __init__(self, codes: Tensor, scale: Tensor, base: Tensor | None, bias: Tensor | None, *sizes: Any) -> None:
        super().__init__()
        _keep(self, codes=codes, scale=scale, base=base, bias=bias)
        self.gain, self.bits, self.outputs = sizes

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        weight = (self.codes, self.scale, self.base, self.bias)
        found: Tensor = torch.ops.triptych.step_linear(flat, *weight, self.gain, self.bits, self.outputs)
        return found.view(*inputs.shape[:-1], self.outputs)


class TracedEmbedding(nn.Module):
    """A `NativeEmbedding` as one operator."""

    def __init__(self, codes: Tensor, scale: Tensor, base: Tensor | None, *sizes: Any) -> None:
        super().__init__()
        _keep(self, codes=codes, scale=scale, base=base)
        self.gain, self.bits, self.columns, self.rows = sizes

    def forward(self, ids: Tensor) -> Tensor:
        weight = (self.codes, self.scale, self.base)
        found: Tensor = torch.ops.triptych.step_rows(
            ids.reshape(-1), *weight, self.gain, self.bits, self.columns, self.rows
        )
        return found.view(*ids.shape, self.columns)


class TracedPart(nn.Module):
    """A `JoinedPart`: its whole is a module of it, so that the whole's tensors are known as the model's."""

    def __init__(self, joined: Joined, at: int) -> None:
        super().__init__()
        self.joined, self.at = joined, at
        self.whole = joined.whole

    def forward(self, inputs: Tensor) -> Tensor:
        return self.joined.take(inputs, self.at)


class TracedNorm(nn.Module):
    """A `NativeNorm` in torch's words, which a compiler puts together with what is beside it."""

    def __init__(self, weight: nn.Parameter, added: float, epsilon: float) -> None:
        super().__init__()
        self.weight, self.added, self.epsilon = weight, added, epsilon

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + self.epsilon)
        return found * (self.weight + self.added if self.added else self.weight)


def traced(layer: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """What makes the traced layer of a native one: a class and its arguments. None for any other object."""
    if isinstance(layer, JoinedPart):
        return TracedPart, (layer.joined, layer.at)
    if isinstance(layer, NativeNorm):
        return TracedNorm, (layer.weight, layer.added, layer.epsilon)
    if not isinstance(layer, NativeLinear | NativeEmbedding):
        return None
    weight = layer.native
    codes = (weight.codes, weight.scale, weight.base)
    if isinstance(layer, NativeLinear):
        return TracedLinear, (*codes, layer.bias, weight.gain, weight.bits, weight.rows)
    return TracedEmbedding, (*codes, weight.gain * layer.factor, weight.bits, weight.columns, weight.rows)


def _keep(module: nn.Module, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor, persistent=False)


class Step(nn.Module):
    """The model as one function of tensors: [1, T] tokens, their positions and slots, and which logits are wanted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(NAME)
        self.windows = layer_windows(model.config.get_text_config())
        self._cache_name = cache_name(model)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        wanted: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids,
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=wanted,
            **{self._cache_name: _Cache(self.windows, keys, values, slots, positions)},
        ).logits
        return logits[0].float()


class StepCache(NamedTuple):
    """What a step takes for a layer of the engine's cache: [slots, heads, length, dim] each."""

    keys: Tensor
    values: Tensor


def step_caches(config: Any, *, slots: int, length: int) -> list[StepCache]:
    """Of a model with this configuration, empty."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (slots, heads, length, dim)
    return [StepCache(torch.zeros(shape), torch.zeros(shape)) for _ in layer_windows(config)]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Writes nothing: the operator does, which reads it too."""

    def __init__(self, window: int | None, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.window, self.keys, self.values = window, keys, values
        self.is_sliding, self.is_initialized = window is not None, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class _Cache(Cache):  # type: ignore[misc]
    """`traced` is the one of the forward that is being traced: transformers does not hand it to attention."""

    traced: _Cache

    def __init__(
        self,
        windows: Sequence[int | None],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        slots: Tensor,
        positions: Tensor,
    ) -> None:
        self.slots, self.positions = slots, positions
        super().__init__(layers=[_Layer(*layer) for layer in zip(windows, keys, values, strict=True)])
        _Cache.traced = self


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim]."""
    cache = _Cache.traced
    layer = cache.layers[module.layer_idx]
    if reason := why_not(layer, attention_mask, sliding_window, others):
        raise Untraceable(reason)
    if key.shape != value.shape:
        raise Untraceable("its keys and values differ in size")
    found = torch.ops.triptych.step_attend(
        *(states[0].transpose(0, 1).float() for states in (query, key, value)),
        layer.keys,
        layer.values,
        cache.slots,
        cache.positions,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
        layer.window or 0,
    )
    return found.to(query.dtype)[None], None


AttentionInterface.register(NAME, _attend)
