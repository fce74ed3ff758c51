"""Any causal model of transformers, a request at a time, as its own `generate` would run it: slower, and never wrong.

For models whose cache or attention is not slots: recurrent states, shared or chunked layers, attention sinks. Each
request has the cache that the model makes itself; a step is a forward for each. Knows no schedule and no sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.engine.scheduler import Plan, Row
from pipelines.engine.sight import tensors
from pipelines.engine.slots import Unsupported


class CompatibleModel:
    """The same calls as `flat.FlatModel`. Prompts come whole, and nothing is shared."""

    name = "compatible"
    compiled = False

    def wait_compiled(self) -> None:
        raise Unsupported("it is run the compatible way, which is not compiled")

    def __init__(self, model: Any) -> None:
        self._model = model
        self._states: dict[Row, dict[str, Any]] = {}  # what `generate` carries from one forward to the next

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Tensor:
        return torch.cat([self._next(row) for row in plan.sampled])

    def copy(self, source: int, target: int, length: int) -> None:
        """A request's state is not in a slot: whoever moves is found where it was."""

    def swap(self, one: int, other: int, length: int) -> None: ...

    def settle(self, running: Sequence[Row], kept: Mapping[int, int], capacity: int) -> None:
        """Between two steps: of those that ended nothing is left."""
        if len(self._states) > len(running):
            self._states = {row: self._states[row] for row in running if row in self._states}

    def clear(self) -> None:
        self._states.clear()

    def _next(self, row: Row) -> Tensor:
        ids = torch.tensor([row.tokens], device=self._model.device)
        state = self._states.pop(row, None) if row.computed else None
        first = state is None
        state = state or self._begin(row, ids)
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if first else row.pending, is_first_iteration=first, **state
        )
        out = self._model(**inputs, return_dict=True)
        self._states[row] = self._model._update_model_kwargs_for_generation(out, state, is_encoder_decoder=False)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _begin(self, row: Row, ids: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": True}
        if features := row.request.features:
            state |= tensors(self._model, features)
            if len(row.tokens) > len(row.request.input_ids):  # it had to wait again: what it generated is no picture
                more = len(row.tokens) - len(row.request.input_ids)
                state = {name: _longer(value, len(row.request.input_ids), more) for name, value in state.items()}
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            state["position_ids"] = self._model._prepare_position_ids_for_generation(ids, state)
        return state


def _longer(value: Any, length: int, more: int) -> Any:
    """What has an entry a token of the prompt has one of each token after it too."""
    if isinstance(value, Tensor) and value.shape == (1, length):
        return torch.cat([value, value.new_zeros(1, more)], 1)
    return value
