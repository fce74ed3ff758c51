"""Every tensor's name, dtype and shape, written once, and the five models made of them.

`model_repository/*/config.pbtxt` is this module's text for the default pipeline (a test compares them);
`pipelines.repository` renders the others from it. Knows no Triton at run time: it only writes its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.pipeline import DEFAULT


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


Values = Mapping[Tensor, Any]  # what a model is given or answers: text as str or bytes, ids as a sequence of ints

PROMPT = Tensor("prompt", "TYPE_STRING", (1,), optional=True)  # one user message
MESSAGES = Tensor("messages", "TYPE_STRING", (1,), optional=True)  # OpenAI messages as JSON
TOOLS = Tensor("tools", "TYPE_STRING", (1,), optional=True)  # JSON: OpenAI's tools, tool_choice, parallel_tool_calls
TEXT = Tensor("text", "TYPE_STRING", (1,), optional=True)  # raw text to continue, no chat template
TEXT_IDS = Tensor("text_ids", "TYPE_INT64", (-1,), optional=True)  # the same as token ids, taken as they are
IMAGE = Tensor("image", "TYPE_UINT8", (-1,), optional=True)  # reserved: encoded bytes of one image
SAMPLING = Tensor("sampling", "TYPE_STRING", (1,), optional=True)  # JSON with the OpenAI names
INPUT_IDS = Tensor("input_ids", "TYPE_INT64", (-1,))
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

    def ids(self, tensor: Tensor) -> list[int]:
        """An INT64 [-1] input; empty if it was not sent."""

    def refuse_images(self) -> None:
        """Raises if the request brings one."""


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

MODELS = {
    "preprocess": Model(REQUEST, (INPUT_IDS, optional(SAMPLING))),
    "generate": Model((optional(INPUT_IDS), SAMPLING), (OUTPUT_IDS, FINISH_REASON, ROWS)),
    # The finish reason passes through it: only the text says whether the very end of an answer is a stop string.
    "postprocess": Model(
        (OUTPUT_IDS, SAMPLING, optional(FINISH_REASON), optional(ROWS)), (GENERATED_TEXT, FINISH_REASON, ROWS)
    ),
    "ensemble": Model(
        REQUEST,
        (GENERATED_TEXT, FINISH_REASON),
        steps=(
            (
                "preprocess",
                {tensor.name: tensor.name for tensor in REQUEST},
                {"input_ids": "input_ids", "sampling": "resolved_sampling"},
            ),
            (
                "generate",
                {"input_ids": "input_ids", "sampling": "resolved_sampling"},
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


def model_name(pipeline: str, model: str) -> str:
    """The Triton model of a pipeline: the default pipeline's are the checked-in ones, under their plain names."""
    return model if pipeline == DEFAULT else f"{pipeline}-{model}"


def config_pbtxt(pipeline: str, model: str) -> str:
    """The text of `config.pbtxt`."""
    spec = MODELS[model]
    lines = [f'name: "{model_name(pipeline, model)}"']
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
            lines += ["  step {", f'    model_name: "{model_name(pipeline, stage)}"', "    model_version: -1"]
            lines += [f'    input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
            lines += [f'    output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
            lines += ["  }"]
        lines += ["}"]
    else:
        lines += ["instance_group { count: 1 kind: KIND_CPU }"]
        lines += [f'parameters {{ key: "pipeline" value {{ string_value: "{pipeline}" }} }}']
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor, output: bool = False) -> str:
    dims = ", ".join(map(str, tensor.dims))
    text = f'name: "{tensor.name}" data_type: {tensor.dtype} dims: [ {dims} ]'
    return text + " optional: true" if tensor.optional and not output else text
