"""A recording: what one request gave each stage and got from it, and what that was made with, as a file.

The three stages have four boundaries between them. The arrays of a file are named by boundary and tensor
(`prompt.input_ids`), those of `pipelines.contracts`; text is UTF-8. Knows no Triton and no way to run a stage.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import contracts
from pipelines.contracts import Tensor
from pipelines.pipeline import Pipeline
from pipelines.sources import weights_digest

FORMAT, VERSION = "triptych-recording", 2

BOUNDARIES: Mapping[str, tuple[Tensor, ...]] = {
    "asked": contracts.REQUEST,  # what preprocess takes
    "prompt": (contracts.INPUT_IDS, contracts.SAMPLING, contracts.FEATURES, contracts.PICTURES),  # and generate
    "answer": (contracts.OUTPUT_IDS, contracts.FINISH_REASON),  # and postprocess
    "text": (contracts.GENERATED_TEXT, contracts.FINISH_REASON),
}
Boundary = dict[str, Any]  # by tensor: text, ids as a list, or bytes

# Of a pipeline's declaration, what changes a stage's output.
_MATTERS = (
    *("source", "engine", "dtype", "quantize", "context", "chat_template", "max_images", "max_pixels"),
    *("device_map", "trust_remote_code"),
)
_ABOUT = "about"

# How the engine's steps were made: by the model's own code, by the compiled, or first by the one and then the other.
STEPS = "steps"
PLAIN, COMPILED, MIXED = "plain", "compiled", "mixed"
_DTYPES = {"TYPE_STRING": np.uint8, "TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64}


class RecordingError(Exception):
    """It cannot be used: one sentence."""


@dataclass
class Recording:
    about: dict[str, Any]
    asked: Boundary = field(default_factory=dict)
    prompt: Boundary = field(default_factory=dict)
    answer: Boundary = field(default_factory=dict)
    text: Boundary = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        arrays = {_ABOUT: _array("TYPE_STRING", json.dumps({"format": FORMAT, "version": VERSION, **self.about}))}
        for boundary, tensors in BOUNDARIES.items():
            held: Boundary = getattr(self, boundary)
            arrays |= {f"{boundary}.{t.name}": _array(t.dtype, held[t.name]) for t in tensors if t.name in held}
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Recording:
        """Raises RecordingError."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                about = json.loads(file[_ABOUT].tobytes())
                if about["format"] != FORMAT:
                    raise KeyError(_ABOUT)
                if about["version"] != VERSION:
                    raise RecordingError(
                        f"it is a recording of version {about['version']}, and this Triptych reads version {VERSION}: "
                        "replay it with the one that recorded it, or record it anew."
                    )
                held = {
                    boundary: {
                        tensor.name: _read(tensor.dtype, file[name])
                        for tensor in tensors
                        if (name := f"{boundary}.{tensor.name}") in file
                    }
                    for boundary, tensors in BOUNDARIES.items()
                }
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            raise RecordingError("it is no recording: make one with `triptych record --trace ID`.") from None
        return cls(about, **held)

    def check(self, pipeline: Pipeline) -> None:
        """Raises RecordingError unless it was made with this pipeline as it is here."""
        for key, here in made_with(pipeline).items():
            if (recorded := self.about.get(key)) != here:
                raise RecordingError(
                    f"it was recorded with {key} = {recorded!r}, and '{pipeline.name}' here has {here!r}: a difference "
                    "would say nothing. Replay it where that is the same, or record it anew."
                )


def made_with(pipeline: Pipeline) -> dict[str, Any]:
    """What must be the same for a stage's output to be."""
    declared = {key: getattr(pipeline, key) for key in _MATTERS}
    digests = {"weights": weights_digest(pipeline), "contracts": contracts.digest(pipeline)}
    return {"pipeline": pipeline.name, **declared, **digests}


def _array(dtype: str, value: str | list[int] | bytes) -> np.ndarray[Any, Any]:
    if isinstance(value, list):
        return np.array(value, dtype=_DTYPES[dtype])
    return np.frombuffer(value.encode() if isinstance(value, str) else value, dtype=np.uint8)


def _read(dtype: str, array: np.ndarray[Any, Any]) -> str | list[int] | bytes:
    if array.dtype != _DTYPES[dtype] or array.ndim != 1:
        raise ValueError(dtype)
    if dtype == "TYPE_INT64":
        ids: list[int] = array.tolist()
        return ids
    data = array.tobytes()
    return data.decode() if dtype == "TYPE_STRING" else data
