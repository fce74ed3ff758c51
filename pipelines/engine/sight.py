"""What a language model is given where a prompt has pictures: taken once a prompt, laid piecewise into flat passes.

A vision-language model of transformers makes of ids and pictures what its language model works on: embeddings, and
whatever else its architecture has (positions on several axes, embeddings for deeper layers, inputs of each layer).
`look` runs it up to there and takes that, whatever it is; `laid` puts it in place of what the model makes of the ids
alone in a flat pass. So no architecture is known here by name, except where one departs from the others (`_Habits`).

Knows no cache, no schedule, and not what a picture is: features are tensors by the names the model has for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.engine import Array, Request

_MOST_KNOWN = 1024  # pictures, or rows of them, of which it is remembered how far ahead they put what follows

# Values for some of the tokens only, in their order, by the name of the mask that says which.
_SCATTERED = {"visual_pos_masks": "deepstack_visual_embeds", "image_embeds_position_mask": "image_embeds"}


@dataclass
class Given:
    """What a prompt's tokens are to the language model. `ahead`: what follows them is that far ahead of its place."""

    per_token: dict[str, Tensor]  # [1, tokens, …]
    scattered: dict[str, tuple[Tensor, Tensor]]  # by mask: [tokens], and […, those of them that it is true for, dim]
    positions: Tensor | None  # [axes, tokens]; None: each token's place
    ahead: int

    def values(self, mask: str, start: int, end: int) -> Tensor:
        """Those of the tokens start … end."""
        where, values = self.scattered[mask]
        return values[..., int(where[:start].sum()) : int(where[:end].sum()), :]

    @property
    def whole(self) -> bool:
        return bool(self.per_token or self.scattered)

    def spent(self) -> Given:
        """All that is needed once the prompt is computed."""
        return Given({}, {}, None, self.ahead)


class Piece(NamedTuple):
    """The tokens start … start + length of a prompt with pictures are those from `at` of a flat pass."""

    given: Given
    at: int
    start: int
    length: int


class _Stopped(Exception):
    """The language model was reached."""


class Sight:
    """Of one model. `caller` is what flat passes call: the model, or its half that gives logits without pictures."""

    def __init__(self, model: Any) -> None:
        self._model = model
        decoder = model.get_decoder()
        headed = decoder is not model and decoder.get_output_embeddings() is not None
        self.caller: Any = decoder if headed else model
        self._language: Any = decoder.model if headed else decoder
        self._habits = _habits(self._language)
        self.offset = self._habits.offset
        self._taken: dict[str, Any] | None = None
        self._pieces: Sequence[Piece] | None = None
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._language.register_forward_pre_hook(self._met, with_kwargs=True)

    def of(self, request: Request, given: Given | None, start: int) -> Given:
        """What is to be given of its tokens from `start`. `given` is the answer to the last call, if there was one."""
        if given and given.whole:
            return given
        key = None
        if request.identity is not None:
            identity = np.array(request.identity)
            key = identity[identity < 0].tobytes()
            if key in self._known and (identity[start:] >= 0).all():  # its pictures are in the cache
                self._known.move_to_end(key)
                return Given({}, {}, None, self._known[key])
        found = self.look(request.input_ids, request.features or {})
        if key is not None:
            self._known[key] = found.ahead
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return found

    def look(self, ids: Sequence[int], features: Mapping[str, Array]) -> Given:
        """What the language model is given of a whole prompt."""
        self._taken = {}
        try:
            self._model(**self.inputs(ids, features), use_cache=False)
        except _Stopped:
            return self._given(self._taken, len(ids))
        finally:
            self._taken = None
        raise RuntimeError("the model has answered without its language model")

    def inputs(self, ids: Sequence[int], features: Mapping[str, Array]) -> dict[str, Tensor]:
        """A prompt as the model itself takes it."""
        return {"input_ids": torch.tensor([ids], device=self._model.device), **tensors(self._model, features)}

    @contextmanager
    def laid(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Flat passes within are given these pieces."""
        with self._habits.flat():
            self._pieces = pieces
            try:
                yield
            finally:
                self._pieces = None

    def positions(self, places: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """The flat pass's `position_ids`, from each token's place in its slot, [tokens]."""
        axes = max((piece.given.positions.shape[0] for piece in pieces if piece.given.positions is not None), default=0)
        if not axes:
            return places[None] + self.offset
        found = places.expand(axes, -1).clone()
        for piece in pieces:
            if piece.given.positions is not None:
                end = piece.start + piece.length
                found[:, piece.at : piece.at + piece.length] = piece.given.positions[:, piece.start : end]
        return found[:, None]

    def _met(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model runs."""
        if self._taken is not None:
            self._taken.update(kwargs)
            raise _Stopped
        return (args, self._replaced(kwargs)) if self._pieces else None

    def _given(self, taken: dict[str, Any], length: int) -> Given:
        scattered = {}
        for mask, values in _SCATTERED.items():
            if taken.get(mask) is not None:
                found = taken[values]
                levels = torch.stack(found) if isinstance(found, list) else found.reshape(-1, found.shape[-1])
                scattered[mask] = (taken[mask].reshape(-1).bool(), levels)
        per_token = {
            name: value
            for name, value in taken.items()
            if name not in ("input_ids", "position_ids", "attention_mask", *_SCATTERED, *_SCATTERED.values())
            and isinstance(value, Tensor)
            and value.shape[:2] == (1, length)
        }
        positions = taken.get("position_ids")
        if positions is None:
            return Given(per_token, scattered, None, 0)
        positions = positions.reshape(-1, length)
        return Given(per_token, scattered, positions, int(positions.max()) + 1 - length)

    def _replaced(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        pieces = self._pieces or ()
        for name in {name for piece in pieces for name in piece.given.per_token}:
            made = kwargs[name].clone()  # of the ids alone
            for piece in pieces:
                if name in piece.given.per_token:
                    value = piece.given.per_token[name]
                    made[:, piece.at : piece.at + piece.length] = value[:, piece.start : piece.start + piece.length]
            kwargs[name] = made
        for mask, values in _SCATTERED.items():
            some = [piece for piece in pieces if mask in piece.given.scattered]
            if some:
                kwargs |= self._scattered(mask, values, some, kwargs)
        return kwargs

    def _scattered(self, mask: str, values: str, pieces: Sequence[Piece], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        ids = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        where = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
        for piece in pieces:
            end = piece.start + piece.length
            where[0, piece.at : piece.at + piece.length] = piece.given.scattered[mask][0][piece.start : end]
        if not where.any():
            return {}
        each = [piece.given.values(mask, piece.start, piece.start + piece.length) for piece in pieces]
        return {mask: where, values: torch.cat(each, -2)}


def tensors(model: Any, features: Mapping[str, Array]) -> dict[str, Tensor]:
    """As the model takes them: where they are not whole numbers, in its precision."""
    made = {name: torch.tensor(array, device=model.device) for name, array in features.items()}
    return {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in made.items()}


class _Habits:
    """What most models do: positions begin at 0, and masks are left to the attention."""

    offset = 0

    @contextmanager
    def flat(self) -> Iterator[None]:
        yield


class _Kosmos(_Habits):
    """Its positions begin behind the padding's, and it makes a causal mask of every pass, which a flat one has not."""

    def __init__(self, language: Any) -> None:
        self._language = language
        self.offset = language.embed_positions.padding_idx + 1

    @contextmanager
    def flat(self) -> Iterator[None]:
        self._language._prepare_decoder_attention_mask = lambda *_: None
        try:
            yield
        finally:
            del self._language._prepare_decoder_attention_mask  # the class's own again


def _habits(language: Any) -> _Habits:
    return _Kosmos(language) if hasattr(language, "_prepare_decoder_attention_mask") else _Habits()
