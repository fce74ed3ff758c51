"""The two endpoints that generate, as OpenAI has them: what each takes, and the shapes of what it answers.

Pure: a body in, a request out. Knows no HTTP, no server-sent events and no catalog: whether a model exists is not its
question. No parameter is dropped: it is honoured, or refused by name. Names do not change on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gateway import objects, parameters
from gateway.objects import Head, Held
from gateway.parameters import Inputs, Prompts, parse_object
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.sampling import Sampling
from pipelines.tools import Tools, parse_tools, refuse_replaced

MAX_CHOICES = 16  # unless the settings say otherwise
_COMPLETION_MAX_TOKENS = 16  # OpenAI, completions, max_tokens: "Defaults to 16"

_OPENAI_SAMPLING = {
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "response_format",
}
_OUR_SAMPLING = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"}
_SAMPLING = frozenset(_OPENAI_SAMPLING | _OUR_SAMPLING)  # passed on as they come
_COMMON = _SAMPLING | {
    "model",
    "stream",
    "stream_options",
    "n",
    "logprobs",
    "priority",
    "keep_alive",
    "user",
    "metadata",
    "store",
    "service_tier",
}
_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})


@dataclass(frozen=True)
class GenerationRequest:
    """One chat or completion, checked."""

    model: str
    prompts: Sequence[Inputs]
    sampling: Sampling
    messages: Sequence[Mapping[str, Any]] = ()  # of a chat, parsed: what is in `prompts`
    tools: Tools | None = None
    n: int = 1
    priority: int = 0
    batch: bool = False
    keep_alive: int | None = None
    stream: bool = False
    include_usage: bool = False
    include_timing: bool = False
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def shaped(self) -> bool:
        """Whether a grammar holds the answer."""
        return self.sampling.response_format is not None or (self.tools is not None and self.tools.forced)

    def asked(self) -> Iterator[tuple[Inputs, Sampling]]:
        """What to submit for each choice, in the order of their indexes: all of the first prompt's come first.

        With a seed, the choices of a prompt have that and the ones that follow it: else they would be the same.
        """
        for prompt in self.prompts:
            for number in range(self.n):
                yield prompt, self._seeded(number)

    def _seeded(self, number: int) -> Sampling:
        if number == 0 or self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + number + 2**63) % 2**64 - 2**63)


@dataclass(frozen=True)
class Operation:
    """An endpoint that generates."""

    name: str  # as gen_ai.operation.name
    path: str
    id_prefix: str
    parameters: frozenset[str]
    prompts: Callable[[Mapping[str, Any]], Prompts]
    sampling: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # what has another shape here, and defaults
    object: str
    chunk_object: str
    whole: Callable[[str], Held]  # a text, as a choice holds it
    opening: Held | None  # what the choice of a stream's first chunk holds
    piece: Callable[[str], Held]  # a piece of text, as the choice of a chunk holds it
    closing: Held  # what the choice of the chunk with the finish_reason holds
    logprobs: Callable[[Sequence[Entry], Sequence[int]], Held]  # and where each token begins in the choice's text

    @property
    def takes_tools(self) -> bool:
        """Whether an answer is more than its text: calls and reasoning are read out of it."""
        return "tools" in self.parameters


CHAT = Operation(
    name="chat",
    path="/v1/chat/completions",
    id_prefix="chatcmpl-",
    parameters=_COMMON | _TOOLS | {"messages", "max_completion_tokens", "top_logprobs", "modalities"},
    prompts=parameters.chat_prompts,
    sampling=lambda given: {
        name: given[name] for name in ("max_completion_tokens", "logprobs", "top_logprobs") if name in given
    },
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    opening={"delta": {"role": "assistant", "content": ""}},
    piece=lambda text: {"delta": {"content": text}},
    closing={"delta": {}},
    logprobs=objects.chat_logprobs,
)

COMPLETION = Operation(
    name="text_completion",
    path="/v1/completions",
    id_prefix="cmpl-",
    parameters=_COMMON | {"prompt", "best_of", "echo"},
    prompts=parameters.completion_prompts,
    sampling=lambda given: {
        **({} if "max_tokens" in given else {"max_tokens": _COMPLETION_MAX_TOKENS}),
        **parameters.completion_logprobs(given),
    },
    object="text_completion",
    chunk_object="text_completion",
    whole=lambda text: {"text": text},
    opening=None,
    piece=lambda text: {"text": text},
    closing={"text": ""},
    logprobs=objects.completion_logprobs,
)


def parse_request(operation: Operation, body: bytes, max_choices: int = MAX_CHOICES) -> GenerationRequest:
    """The request in a body. A bad one is a StageError that names its parameter; a null is a parameter not given."""
    given = {name: value for name, value in parse_object(body).items() if value is not None}
    model = given.get("model")
    if model is None:
        raise parameters.missing("model")
    if not isinstance(model, str):
        raise StageError("'model' must be a string.", param="model")
    if operation.takes_tools:
        refuse_replaced(given)
    for name in given:
        if name not in operation.parameters:
            raise parameters.unsupported(name)
    parameters.refuse_all_but_harmless(given)
    stream = parameters.boolean(given, "stream")
    include_usage, include_timing = parameters.stream_options(given, stream)
    prompts, messages = operation.prompts(given)
    tools = parse_tools(given) if operation.takes_tools else None
    if tools and tools.callable:
        prompts = [{**prompt, "tools": tools.to_json()} for prompt in prompts]
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    return GenerationRequest(
        model=model,
        prompts=prompts,
        sampling=Sampling.parse({**sampling, **operation.sampling(given)}),
        messages=messages,
        tools=tools,
        n=parameters.choices(given, len(prompts), max_choices),
        priority=parameters.priority(given),
        batch=parameters.batch(given),
        keep_alive=parameters.keep_alive(given),
        stream=stream,
        include_usage=include_usage,
        include_timing=include_timing,
        user=parameters.user(given),
        metadata=parameters.metadata(given),
    )


def new_head(operation: Operation, model: str, *, stream: bool) -> Head:
    kind = operation.chunk_object if stream else operation.object
    return Head(operation.id_prefix + os.urandom(15).hex(), kind, int(time.time()), model)
