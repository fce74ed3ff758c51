"""The first stage: messages, a prompt or raw text in; token ids and checked sampling parameters out.

Calls that `tools` ask for become part of those: a grammar that the answer must follow. Of pictures it makes features,
with the model's own processor. Imports neither torch nor transformers where there are none to be taken, so the stage
starts in the time it takes to read tokenizer.json. Knows no Triton and starts no span: the caller passes a factory of
those to time the steps with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from tokenizers import Tokenizer

from observability import tracing
from pipelines import contracts
from pipelines import prompt as prompts
from pipelines.answer.formats import AnswerFormat
from pipelines.answer.grammar import grammar
from pipelines.contracts import Tensor, Values
from pipelines.errors import StageError
from pipelines.messages import check_count, image_parts, load_messages, utf8
from pipelines.pipeline import Pipeline
from pipelines.sampling import Sampling
from pipelines.structure import Structure
from pipelines.template import ChatTemplate
from pipelines.tools import Tools, load_tools

if TYPE_CHECKING:
    from pipelines.images.features import Features
    from pipelines.images.reading import Source
    from pipelines.images.vision import Vision

Timing = Callable[[str], tracing.Span]


def _untimed(name: str) -> tracing.Span:
    return tracing.NO_SPAN


@dataclass(frozen=True)
class Prepared:
    """What generate needs. `sampling` is complete: it has a seed and a `max_tokens` that fits the context."""

    input_ids: list[int]
    sampling: Sampling
    features: Features | None = None
    pictures: list[tuple[int, int]] = field(default_factory=list)  # their sizes, in the order of the prompt


@dataclass(frozen=True)
class Preprocess:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int
    vision: Vision | None = None  # None: text only

    @classmethod
    def of(cls, pipeline: Pipeline) -> Preprocess:
        """Of a pipeline whose files are there."""
        from pipelines.engine.limits import read_limits

        home = pipeline.home
        vision = None
        if pipeline.takes_images:
            from pipelines.images.vision import Vision  # transformers: only where it is used

            vision = Vision.load(pipeline)
        context = pipeline.context or read_limits(home).context
        return replace(cls.load(home, context=context, template=pipeline.chat_template), vision=vision)

    @classmethod
    def load(cls, home: Path, *, context: int, template: str = "") -> Preprocess:
        """From a prepared folder. `context` is the model's limit in tokens, prompt and answer together."""
        tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        # Some tokenizer.json files carry the truncation and padding of their training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, ChatTemplate.load(home, template), context)

    @cached_property
    def form(self) -> AnswerFormat:
        return AnswerFormat.of(self.template)

    def run(
        self,
        *,
        messages: str | bytes | None = None,
        prompt: str | bytes | None = None,
        text: str | bytes | None = None,
        text_ids: Sequence[int] | None = None,
        tools: str | bytes | None = None,
        sampling: str | bytes | None = None,
        image: bytes | None = None,
        stage: Timing = _untimed,
    ) -> Prepared:
        """Exactly one of `messages` (JSON), `prompt` (one user message), `text` and `text_ids` (continued as it is).

        `tools` (JSON) go with a chat, which the first two are; `image` (encoded) goes with `prompt`, before its words.
        """
        inputs = {"messages": messages, "prompt": prompt, "text": text, "text_ids": text_ids}
        given = [name for name, value in inputs.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise StageError(
                f"Exactly one of messages, prompt, text and text_ids is needed; got {got}.",
                param=(given or ["messages"])[-1],
            )
        param = given[0]
        if image is not None:
            self._check_image(param)
        wanted = self._possible(_sampling(sampling))
        if self.vision and self.vision.check_sampling:
            self.vision.check_sampling(wanted)
        offered = load_tools(tools) if tools is not None else None
        if offered and param in ("text", "text_ids"):
            raise StageError(f"'tools' go with 'messages' or 'prompt', not with '{param}'.", param="tools")
        if text_ids is not None:
            return Prepared(self._known(text_ids), self._fit(wanted, len(text_ids), param))
        if text is not None:
            rendered = utf8(text, "text")
            with stage("tokenize"):
                ids: list[int] = self.tokenizer.encode(rendered, add_special_tokens=True).ids
            return self._prepared(wanted, param, ids)
        chat = load_messages(messages) if messages is not None else _one_message(utf8(prompt or "", "prompt"), image)
        sources = self._sources(chat, image)
        with stage("render"):
            rendered = self._render(chat, offered, param)
        if offered and offered.callable:
            wanted = self._constrained(wanted, offered, rendered)
        if self.vision:
            seen = self.vision.read(rendered, sources, stage, param=param)
            return self._prepared(wanted, param, seen.input_ids, seen.features, seen.sizes)
        with stage("tokenize"):
            # A template writes the special tokens itself; the tokenizer's post-processor would write them
            # twice.
            ids = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        return self._prepared(wanted, param, ids)

    def sample(self) -> Prepared:
        """A prompt with a picture, for trying a model that takes them."""
        from pipelines.images.processor import Processor

        chat = _one_message("What is this?", b"")
        processor = self.vision.processor if self.vision else None
        if not isinstance(processor, Processor):
            raise TypeError("this pipeline has no processor of pictures")
        input_ids, features = processor.sample(self._render(chat, None, "messages"))
        return Prepared(input_ids, Sampling(), features)

    def outputs(self, prepared: Prepared) -> Values:
        """By tensor. Where pictures are taken there are always all of them: a step of an ensemble waits for each."""
        sampling = prepared.sampling.to_json()
        values: dict[Tensor, Any] = {contracts.INPUT_IDS: prepared.input_ids, contracts.SAMPLING: sampling}
        if self.vision is None:
            return values
        from pipelines.images.features import pack

        features: Any = pack(prepared.features) if prepared.features else []
        return {**values, contracts.FEATURES: features, contracts.PICTURES: orjson.dumps(prepared.pictures)}

    def _prepared(
        self,
        wanted: Sampling,
        param: str,
        ids: list[int],
        features: Features | None = None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Prepared:
        if not ids:
            raise StageError(f"'{param}' gives no tokens: there is nothing to continue.", param=param)
        return Prepared(ids, self._fit(wanted, len(ids), param), features, list(sizes))

    def _check_image(self, param: str) -> None:
        if self.vision is None:
            raise StageError("'image' is not supported by this pipeline: it reads text only.", param="image")
        if param != "prompt":
            where = ": there an image is an 'image_url' part" if param == "messages" else ""
            raise StageError(f"'image' goes with 'prompt', not with '{param}'{where}.", param="image")

    def _sources(self, chat: Sequence[dict[str, object]], image: bytes | None) -> list[Source]:
        """The chat's pictures in order, none of them looked at yet."""
        check_count(chat, self.vision.max_images if self.vision else 0)
        parts = image_parts(chat)
        if not parts:
            return []
        from pipelines.images.reading import Source

        if image is not None:
            return [Source("image", image)]
        return [Source(part.path, part.url, low=part.detail == "low") for part in parts]

    def _known(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise StageError("'text_ids' gives no tokens: there is nothing to continue.", param="text_ids")
        for token_id in ids:
            if not 0 <= token_id < 2**32 or self.tokenizer.id_to_token(token_id) is None:
                raise StageError(f"'text_ids' holds {token_id}, which is no token of this model.", param="text_ids")
        return list(ids)

    def _render(self, chat: Sequence[dict[str, object]], tools: Tools | None, param: str) -> str:
        if self.vision and self.vision.question:
            return self.vision.question(chat, tools)
        if self.template is None:
            raise StageError(
                "This pipeline has no chat template (it is a base model): send 'text' (POST /v1/completions) instead.",
                param=param,
            )
        if self.vision is None:
            return prompts.render(self.template, self.form, chat, tools)
        processor = self.vision.processor
        return prompts.render(
            self.template, self.form, chat, tools, image_token=processor.image_token, reserved=processor.reserved
        )

    def _constrained(self, sampling: Sampling, tools: Tools, rendered: str) -> Sampling:
        """Calls that must be made are a structure; so is an answer of a given shape that may be calls instead."""
        if not (tools.forced or sampling.response_format):
            return sampling
        source = grammar(
            self.form,
            tools,
            self.tokenizer.token_to_id,
            thinking=self.form.opens_in(rendered),
            otherwise=None if tools.forced else sampling.response_format,
        )
        return replace(sampling, response_format=Structure("grammar", source))

    def _possible(self, sampling: Sampling) -> Sampling:
        """What only the tokenizer can say: whether a biased token is one, and a structure can be followed."""
        size = self.tokenizer.get_vocab_size()
        if sampling.logit_bias and (last := sampling.logit_bias[-1][0]) >= size:
            raise StageError(
                f"'logit_bias' has token {last}; this model's tokens are 0 to {size - 1}.", param="logit_bias"
            )
        if sampling.response_format is not None:
            from pipelines.trial import check  # llguidance: only where it is used

            check(sampling.response_format, self._special_tokens)
        return sampling

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(added.content for added in self.tokenizer.get_added_tokens_decoder().values() if added.special)

    def _fit(self, sampling: Sampling, used: int, param: str) -> Sampling:
        """`max_tokens` resolved: what was asked for if it fits, or all that is left. OpenAI's wording."""
        limit = f"This model's maximum context length is {self.context} tokens."
        if used >= self.context:
            raise StageError(
                f"{limit} However, your {param} resulted in {used} tokens. Please reduce the length of the {param}.",
                code="context_length_exceeded",
                param=param,
            )
        asked = sampling.max_tokens
        if asked is not None and used + asked > self.context:
            raise StageError(
                f"{limit} However, you requested {used + asked} tokens ({used} in the {param}, {asked} in "
                f"the completion). Please reduce the length of the {param} or the completion.",
                code="context_length_exceeded",
                param=param,
            )
        most = self.context - used if asked is None else asked
        if sampling.min_tokens > most:
            raise StageError(
                f"{limit} However, you requested at least {sampling.min_tokens} tokens after the {used} in the "
                f"{param}. Please reduce min_tokens.",
                code="context_length_exceeded",
                param="min_tokens",
            )
        return replace(sampling, max_tokens=most)


def _sampling(text: str | bytes | None) -> Sampling:
    try:
        return Sampling.from_json(text or "{}").with_seed()
    except RecursionError:
        raise StageError("sampling is not valid JSON: it is nested too deeply.", param="sampling") from None


def _one_message(prompt: str, image: bytes | None) -> list[dict[str, object]]:
    if image is None:
        return [{"role": "user", "content": prompt}]
    picture = {"type": "image_url", "image_url": {"url": "", "detail": "auto"}}  # the bytes go their own way
    return [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}]
