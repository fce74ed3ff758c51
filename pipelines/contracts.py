"""Every tensor's name, dtype and shape, written once, and the five models made of them.

`model_repository/*/config.pbtxt` is this module's text for the default pipeline (a test compares them);
`pipelines.repository` renders the others from it. What is there for pictures only is in the models of a pipeline that
takes them. Knows no Triton at run time: it only writes its configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.pipeline import DEFAULT, Pipeline

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # as config.pbtxt spells it
    dims: tuple[int, ...]
    optional: bool = False

    @property
    def wire_dtype(self) -> str:
        """As the inference protocol spells it."""
        return {"TYPE_STRING": "BYTES"}.get(self.dtype, self.dtype.removeprefix("TYPE_"))


# What a model is given or answers: text as str or bytes, ids as a sequence of ints, bytes as an array, or, between two
# calls of models, as what holds them.
Values = Mapping[Tensor, Any]

PROMPT = Tensor("prompt", "TYPE_STRING", (1,), optional=True)  # one user message
MESSAGES = Tensor("messages", "TYPE_STRING", (1,), optional=True)  # OpenAI messages as JSON
TOOLS = Tensor("tools", "TYPE_STRING", (1,), optional=True)  # JSON: OpenAI's tools, tool_choice, parallel_tool_calls
TEXT = Tensor("text", "TYPE_STRING", (1,), optional=True)  # raw text to continue, no chat template
TEXT_IDS = Tensor("text_ids", "TYPE_INT64", (-1,), optional=True)  # the same as token ids, taken as they are
IMAGE = Tensor("image", "TYPE_UINT8", (-1,), optional=True)  # encoded bytes of one image, beside `prompt`
SAMPLING = Tensor("sampling", "TYPE_STRING", (1,), optional=True)  # JSON with the OpenAI names
INPUT_IDS = Tensor("input_ids", "TYPE_INT64", (-1,))
FEATURES = Tensor("features", "TYPE_UINT8", (-1,))  # `images.features`: what the model takes of pictures; empty: none
PICTURES = Tensor("pictures", "TYPE_STRING", (1,))  # JSON: [width, height] of each picture of the prompt, in order
OUTPUT_IDS = Tensor("output_ids", "TYPE_INT64", (-1,))
FINISH_REASON = Tensor("finish_reason", "TYPE_STRING", (1,))
GENERATED_TEXT = Tensor("generated_text", "TYPE_STRING", (1,))
LOGPROBS = Tensor("logprobs", "TYPE_STRING", (1,))  # JSON, if they were asked for: an entry a token of the text
ROWS = Tensor("rows", "TYPE_STRING", (1,))  # JSON, one entry a request: what a merged message says beside its token ids
EVENTS = Tensor("events", "TYPE_STRING", (1,))  # JSON: one lane message

# What a request asks of generate and of the orchestrator, in the request parameter of this name.
OPERATION = "operation"


class Asked(Protocol):
    """A request to a model, decoded (`triton_io.Incoming`)."""

    id: str
    operation: str
    parameters: dict[str, Any]
    traceparent: str | None

    def text(self, tensor: Tensor) -> str | None:
        """A BYTES [1] input, or None if it was not sent."""

    def encoded(self, tensor: Tensor) -> bytes | None:
        """The same as it came, for whoever passes it on: pictures make it megabytes."""

    def ids(self, tensor: Tensor) -> list[int]:
        """An INT64 [-1] input; empty if it was not sent."""

    def data(self, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """A UINT8 [-1] input, the asker's own; None if it was not sent."""


_SIGN = b'"image_url"'


def brings_images(messages: bytes | None, image: object | None) -> bool:
    """Whether a request seems to hold a picture. Its JSON is not read, for which there may be much of it: who only
    quotes the word is taken for one too, and who writes the key with escapes is not."""
    return image is not None or (messages is not None and _SIGN in messages)


def optional(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tensor.dims, optional=True)


@dataclass(frozen=True)
class Model:
    """One of the five. `steps` makes it an ensemble: (stage, {its input: ensemble tensor}, {its output: …})."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    decoupled: bool = False
    steps: tuple[tuple[str, dict[str, str], dict[str, str]], ...] = ()


TEXTS = (PROMPT, MESSAGES, TOOLS, TEXT)
REQUEST = (*TEXTS, TEXT_IDS, IMAGE, SAMPLING)  # what the ensemble, the orchestrator and preprocess all take

ENSEMBLE = "ensemble"


def _models(*, pictures: bool) -> dict[str, Model]:
    features = {"features": "features"} if pictures else {}
    return {
        "preprocess": Model(REQUEST, (INPUT_IDS, optional(SAMPLING), *((FEATURES, PICTURES) if pictures else ()))),
        "generate": Model(
            (optional(INPUT_IDS), SAMPLING, *((optional(FEATURES),) if pictures else ())),
            (OUTPUT_IDS, FINISH_REASON, ROWS),
        ),
        # The finish reason passes through it: only the text says whether the very end of an answer is a stop string.
        "postprocess": Model(
            (OUTPUT_IDS, SAMPLING, optional(FINISH_REASON), optional(ROWS)), (GENERATED_TEXT, FINISH_REASON, ROWS)
        ),
        ENSEMBLE: Model(
            REQUEST,
            (GENERATED_TEXT, FINISH_REASON),
            steps=(
                (
                    "preprocess",
                    {tensor.name: tensor.name for tensor in REQUEST},
                    {"input_ids": "input_ids", "sampling": "resolved_sampling", **features},
                ),
                (
                    "generate",
                    {"input_ids": "input_ids", "sampling": "resolved_sampling", **features},
                    {"output_ids": "output_ids", "finish_reason": "engine_finish_reason"},
                ),
                (
                    "postprocess",
                    {
                        "output_ids": "output_ids",
                        "sampling": "resolved_sampling",
                        "finish_reason": "engine_finish_reason",
                    },
                    {"generated_text": "generated_text", "finish_reason": "finish_reason"},
                ),
            ),
        ),
        "orchestrator": Model(REQUEST, (GENERATED_TEXT, FINISH_REASON, LOGPROBS, EVENTS), decoupled=True),
    }


_TEXT, _VISION = _models(pictures=False), _models(pictures=True)
MODELS = tuple(_TEXT)  # the stages first: the orchestrator calls them


def models_of(pipeline: Pipeline) -> Mapping[str, Model]:
    return _VISION if pipeline.takes_images else _TEXT


def digest(pipeline: Pipeline) -> str:
    """Another one for other tensors: what was written with one is not read with another."""
    return hashlib.sha256(repr(models_of(pipeline)).encode()).hexdigest()[:16]


def model_name(pipeline: str, model: str) -> str:
    """The Triton model of a pipeline: the default pipeline's are the checked-in ones, under their plain names."""
    return model if pipeline == DEFAULT else f"{pipeline}-{model}"


def config_pbtxt(pipeline: Pipeline, model: str) -> str:
    """The text of `config.pbtxt`."""
    spec = models_of(pipeline)[model]
    lines = [f'name: "{model_name(pipeline.name, model)}"']
    lines += ['platform: "ensemble"'] if spec.steps else ['backend: "python"']
    lines += ["max_batch_size: 0"]
    if spec.decoupled:
        lines += ["model_transaction_policy { decoupled: true }"]
    lines += [f"input {{ {_tensor(tensor)} }}" for tensor in spec.inputs]
    # An output has no `optional`: Triton lets a model leave out what was not asked for.
    lines += [f"output {{ {_tensor(tensor, output=True)} }}" for tensor in spec.outputs]
    if spec.steps:
        lines += ["ensemble_scheduling {"]
        for stage, inputs, outputs in spec.steps:
            lines += ["  step {", f'    model_name: "{model_name(pipeline.name, stage)}"', "    model_version: -1"]
            lines += [f'    input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
            lines += [f'    output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
            lines += ["  }"]
        lines += ["}"]
    else:
        count = pipeline.preprocess_instances if model == "preprocess" else 1
        lines += [f"instance_group {{ count: {count} kind: KIND_CPU }}"]
        lines += [f'parameters {{ key: "pipeline" value {{ string_value: "{pipeline.name}" }} }}']
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor, output: bool = False) -> str:
    dims = ", ".join(map(str, tensor.dims))
    text = f'name: "{tensor.name}" data_type: {tensor.dtype} dims: [ {dims} ]'
    return text + " optional: true" if tensor.optional and not output else text
