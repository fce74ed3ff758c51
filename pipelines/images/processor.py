"""A model's own processor: from a rendered chat and its decoded pictures to token ids and what the model sees.

Any processor of transformers, with its image processor in the form that needs Pillow and numpy only; what it has for
video and sound is left out. Knows no messages, no URL and no encoded picture; imports transformers when it loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import StageError
from pipelines.images.features import Features

# A resized side grows with this: a picture of one row, made as high as a model wants it, would take gigabytes.
MAX_ASPECT = 100
_OVERSAMPLING = 2  # of a side, before a model's own resizing, that loses nothing
_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_PLAIN = {"padding": False, "truncation": False}  # whatever a tokenizer's files say
_NOT_FEATURES = ("input_ids", "attention_mask", "text_replacement_offsets")
_WRITTEN_PLACES = "image_embeds_position_mask"  # where a processor that writes a picture's place says it has


@dataclass(frozen=True)
class Processor:
    """`image_token` is what stands for a picture in a rendered chat.

    It is empty where the processor itself writes the picture's place, before the text, as Kosmos-2's does; it then
    takes one picture.
    """

    own: Any
    image_token: str

    @classmethod
    def load(cls, home: Path) -> Processor:
        """From a prepared folder; a ValueError says what it lacks."""
        from transformers import AutoImageProcessor, AutoTokenizer

        kind = _without_absent(_kind(home))
        parts = {
            "image_processor": lambda: AutoImageProcessor.from_pretrained(home, backend="pil", local_files_only=True),
            "tokenizer": lambda: AutoTokenizer.from_pretrained(home, local_files_only=True),
        }
        if not parts.keys() <= set(kind.get_attributes()):
            raise ValueError(f"{kind.__name__} takes no pictures beside text")
        settings, _ = kind.get_processor_dict(home, local_files_only=True)
        own = kind.from_args_and_dict([parts.get(name, _absent)() for name in kind.get_attributes()], settings)
        # The first call leaves the tokenizer as all others want it, who may then come from several threads: to
        # change a tokenizer while another thread uses it is an error.
        own.tokenizer(["a"], **_PLAIN)
        processor = cls(own, getattr(own, "image_token", None) or "")
        _ = processor.least_side  # takes a while: no request shall wait for it
        return processor

    @cached_property
    def reserved(self) -> tuple[str, ...]:
        """What no text of a user may hold, for it would be taken for a picture (or a video, or a sound)."""
        names = ("image_token", "video_token", "audio_token", *(() if self.image_token else ("boi_token", "eoi_token")))
        words = [getattr(self.own, name, None) for name in names]
        return tuple(dict.fromkeys(word for word in [*words, *self._stand_ins] if word))

    @cached_property
    def _stand_ins(self) -> list[str]:
        """The tokens that the model replaces by what it sees; most processors' `image_token` is the only one."""
        ids = [token_id for token_id in self.own.image_token_ids if token_id is not None]
        words: list[str] = self.own.tokenizer.convert_ids_to_tokens(ids)
        return words

    @cached_property
    def least_side(self) -> int | None:
        """Below this, a picture's sides lose what the model could have seen; None if it sees every size."""
        own = self.own.image_processor
        size = {name: value for name, value in dict(getattr(own, "size", None) or {}).items() if value}
        if not getattr(own, "do_resize", False) or size.keys() not in ({"height", "width"}, {"shortest_edge"}):
            return None
        side = max(size.values())
        try:
            # What makes tiles of a large picture, or keeps its shape, says so in many ways. So it is tried.
            seen = [self._seen((side, side)), self._seen((3 * side, 2 * side))]
        except (KeyError, TypeError, ValueError):
            return None
        return _OVERSAMPLING * side if seen[0] == seen[1] and len(seen[0]) == 4 and seen[0][0] == 1 else None

    def run(
        self, rendered: str, pictures: Sequence[Image.Image], *, param: str = "messages"
    ) -> tuple[list[int], Features | None]:
        """The ids of a chat that its template rendered, and what the model needs besides, if there are pictures.

        A StageError names `param` if the model cannot take them.
        """
        self._check(rendered, pictures, param)
        try:
            given = self._called(rendered, pictures)
        except ValueError as error:  # a processor's own way of refusing
            raise StageError(f"The model's processor refuses this: {error}", param=param) from None
        ids: list[int] = given["input_ids"][0].tolist()
        if not pictures:
            return ids, None
        arrays = {name: np.asarray(value) for name, value in given.items() if name not in _NOT_FEATURES}
        return ids, Features(arrays, self._identity(given, pictures))

    def sample(self, rendered: str) -> tuple[list[int], Features]:
        """A prompt with one picture, for trying a model: `rendered` has one place for it."""
        ramp = np.arange(64, dtype=np.uint8) * 4
        rows = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
        ids, features = self.run(rendered, [Image.fromarray(rows)])
        if features is None:
            raise AssertionError("a prompt with a picture has features")
        return ids, features

    def _check(self, rendered: str, pictures: Sequence[Image.Image], param: str) -> None:
        if not self.image_token:
            if len(pictures) > 1:
                raise StageError(f"This model takes one picture; there are {len(pictures)}.", param=param)
        elif (places := rendered.count(self.image_token)) != len(pictures):
            raise StageError(
                f"The chat has {len(pictures)} pictures, but the prompt rendered from it has {places} places for "
                f"them ({self.image_token!r}): a text may not hold that word, and a template must keep every picture.",
                param=param,
            )
        for picture in pictures:
            check_shape(picture.size, param=param)

    def _called(self, rendered: str, pictures: Sequence[Image.Image]) -> Any:
        if not self.image_token:  # the processor writes all that is special
            return self.own(images=[*pictures] or None, text=[rendered], text_kwargs=_PLAIN, return_tensors="np")
        return self.own(
            images=[*pictures] or None,
            text=[rendered],
            text_kwargs=_PLAIN | {"add_special_tokens": False},
            return_text_replacement_offsets=True,
            return_tensors="np",
        )

    def _identity(self, given: Any, pictures: Sequence[Image.Image]) -> list[int]:
        ids: NDArray[np.int64] = given["input_ids"][0]
        places, shares = self._places(given, ids)
        if not len(places):
            raise RuntimeError(f"{type(self.own).__name__} does not say which tokens stand for pictures")
        numbers = self._numbers(given, pictures)
        if len(shares) != len(numbers) or sum(shares) != len(places):
            # Which place is whose cannot be told, so each stands for all.
            numbers, shares = [_negative(repr(numbers).encode())], [len(places)]
        identity = ids.astype(np.int64)
        identity[places] = np.repeat(np.array(numbers, dtype=np.int64), shares)
        numbered: list[int] = identity.tolist()
        return numbered

    def _numbers(self, given: Any, pictures: Sequence[Image.Image]) -> list[int]:
        """One for each picture: of its pixels, or of what the model sees of it, whichever is less to read."""
        seen = given.get("pixel_values", ())
        if self.least_side is None or len(seen) != len(pictures):
            return [_number(picture) for picture in pictures]
        return [
            _number(picture) if 3 * picture.width * picture.height <= row.nbytes else _negative(_bytes(row))
            for picture, row in zip(pictures, seen, strict=True)
        ]

    def _places(self, given: Any, ids: NDArray[np.int64]) -> tuple[NDArray[np.intp], list[int]]:
        """Where tokens stand for pictures, and how many of these are each picture's, in order."""
        if not self.image_token:
            places = np.flatnonzero(given[_WRITTEN_PLACES][0]) if _WRITTEN_PLACES in given else ids[:0]
            return places, [len(places)]
        # transformers checks that the ids have as many of these as the text.
        places = np.flatnonzero(np.isin(ids, self.own.image_token_ids))
        replaced = given.get("text_replacement_offsets", [[]])[0]
        return places, [sum(map(each["replacement"].count, self._stand_ins)) for each in replaced]

    def _seen(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of what the model sees of a picture."""
        return np.shape(self.own.image_processor([Image.new("RGB", size)], return_tensors="np")["pixel_values"])


def check_shape(size: tuple[int, int], *, param: str) -> None:
    """That a picture's longer side is not too long for the shorter; a StageError names `param`."""
    if max(size) > MAX_ASPECT * min(size):
        raise StageError(
            f"'{param}': a picture of {size[0]}x{size[1]} pixels is too long: its longer side may be "
            f"{MAX_ASPECT} times the shorter.",
            param=param,
        )


def _number(picture: Image.Image) -> int:
    return _negative(repr((picture.mode, picture.size)).encode(), picture.tobytes())


def _negative(*data: bytes | memoryview) -> int:
    """The same for the same data only."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    return int.from_bytes(digest.digest()[:8], "little") | -(2**63)


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _absent() -> None:
    return None


def _kind(home: Path) -> Any:
    """The processor's class: the one that the folder's files name, else that of the model's type."""
    import transformers
    from transformers import ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    named = (_read(home / file).get("processor_class") for file in _FILES)
    name = next(filter(None, named), None) or PROCESSOR_MAPPING_NAMES.get(_read(home / "config.json").get("model_type"))
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, ProcessorMixin)):
        found = f"{name} is none, or needs torchvision" if name else "none is named"
        raise ValueError(f"{home} has no processor of pictures that transformers can load here: {found}")
    return kind


def _without_absent(kind: Any) -> Any:
    """The same class, which takes None for what has no part in pictures."""

    def check(self: Any, name: str, part: object) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _read(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return value if isinstance(value, dict) else {}
