"""How one request is sampled: the OpenAI names, validated once, the same from HTTP to the engine.

Knows no tokenizer, no torch and no HTTP; a bad value is a StageError that names its parameter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pipelines.errors import StageError
from pipelines.structure import Structure

MAX_STOPS = 4  # OpenAI: "Up to 4 sequences where the API will stop generating further tokens."
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
_SEED_LIMIT = 2**63
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Sampling:
    """`max_tokens` None means: to the end of the context. `seed` None means: drawn when the request arrives.

    `repetition_penalty` is of the prompt and the answer (as transformers has it), `presence_penalty` and
    `frequency_penalty` are of the answer alone (OpenAI). `top_k` 0 is all. `logit_bias` is in the order of its ids.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: Structure | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Sampling:
        """From JSON values with the OpenAI names. A null is a parameter not given; an unknown name is an error."""
        given = {name: value for name, value in values.items() if value is not None}
        if "max_completion_tokens" in given:
            if "max_tokens" in given:
                raise StageError(
                    "max_tokens and max_completion_tokens mean the same: send one of them.",
                    param="max_completion_tokens",
                )
            _integer(given, "max_completion_tokens", minimum=1)
        unknown = sorted(given.keys() - _PARSERS.keys())
        if unknown:
            raise StageError(
                f"Unsupported parameter: '{unknown[0]}'. Sampling takes {', '.join(_PARSERS)}.",
                code="unsupported_parameter",
                param=unknown[0],
            )
        checked: dict[str, Any] = {name: parse(given, name) for name, parse in _PARSERS.items() if name in given}
        if "max_completion_tokens" in checked:
            checked["max_tokens"] = checked.pop("max_completion_tokens")
        sampling = cls(**checked)
        if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
            raise StageError(
                f"'min_tokens' ({sampling.min_tokens}) must not be more than max_tokens ({sampling.max_tokens}).",
                param="min_tokens",
            )
        if sampling.top_logprobs and not sampling.logprobs:
            raise StageError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return sampling

    @classmethod
    def from_json(cls, text: str | bytes) -> Sampling:
        """From the `sampling` tensor."""
        try:
            given = json.loads(text or "{}")
        except ValueError as error:
            raise StageError(f"sampling is not valid JSON: {error}", param="sampling") from None
        if not isinstance(given, dict):
            raise StageError("sampling must be a JSON object with the OpenAI names.", param="sampling")
        return cls.parse(given)

    def to_json(self) -> str:
        """What differs from the defaults, for `from_json`."""
        differing: dict[str, Any] = {
            field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default
        }
        if self.logit_bias:
            differing["logit_bias"] = {str(token_id): bias for token_id, bias in self.logit_bias}
        if self.response_format:
            differing["response_format"] = self.response_format.to_json()
        return json.dumps(differing)

    def with_seed(self) -> Sampling:
        """The same with a seed: a request that gave none gets one at random."""
        if self.seed is not None:
            return self
        return replace(self, seed=int.from_bytes(os.urandom(7), "little"))


def _integer(given: Mapping[str, Any], name: str, minimum: int = -_SEED_LIMIT, maximum: int = _SEED_LIMIT - 1) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise StageError(f"'{name}' must be an integer, not {_shown(value)}.", param=name)
    if not minimum <= value <= maximum:
        most = "below 2**63" if maximum == _SEED_LIMIT - 1 else f"at most {maximum}"
        raise StageError(f"'{name}' must be at least {minimum} and {most}, not {_shown(value)}.", param=name)
    return value


def _number(given: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # a NaN is no number
        raise StageError(f"'{name}' must be a number, not {_shown(value)}.", param=name)
    if not low <= value <= high:
        raise StageError(f"'{name}' must be between {low:g} and {high:g}, not {_shown(value)}.", param=name)
    return float(value)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given[name]
    if not isinstance(value, bool):
        raise StageError(f"'{name}' must be true or false, not {_shown(value)}.", param=name)
    return value


def _top_k(given: Mapping[str, Any], name: str) -> int:
    """-1 is what vLLM calls all."""
    return max(0, _integer(given, name, minimum=-1))


def _logit_bias(given: Mapping[str, Any], name: str) -> tuple[tuple[int, float], ...]:
    value = given[name]
    if not isinstance(value, Mapping):
        raise StageError(f"'{name}' must be an object of token id to bias, not {_shown(value)}.", param=name)
    if len(value) > MAX_BIASES:
        raise StageError(f"'{name}' takes at most {MAX_BIASES} token ids, not {len(value)}.", param=name)
    biases = []
    for key, bias in value.items():
        if not (isinstance(key, str) and _TOKEN_ID.fullmatch(key)):
            raise StageError(f"'{name}' has the key {_shown(key)}, which is not a token id.", param=name)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise StageError(
                f"'{name}' of token {key} must be a number between -100 and 100, not {_shown(bias)}.", param=name
            )
        biases.append((int(key), float(bias)))
    return tuple(sorted(biases))


def _stop(given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = given[name]
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise StageError(f"'{name}' must be a string or a list of strings, not {_shown(value)}.", param=name)
    if len(stops) > MAX_STOPS:
        raise StageError(f"'{name}' takes at most {MAX_STOPS} strings, not {len(stops)}.", param=name)
    if any(not stop for stop in stops):
        raise StageError(f"'{name}' must not hold an empty string.", param=name)
    return tuple(stops)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "max_tokens": lambda given, name: _integer(given, name, minimum=1),
    "max_completion_tokens": lambda given, name: _integer(given, name, minimum=1),
    "temperature": lambda given, name: _number(given, name, 0, 2),
    "top_p": lambda given, name: _number(given, name, 0, 1),
    "seed": _integer,
    "stop": _stop,
    "min_tokens": lambda given, name: _integer(given, name, minimum=0),
    "ignore_eos": _boolean,
    "top_k": _top_k,
    "min_p": lambda given, name: _number(given, name, 0, 1),
    "presence_penalty": lambda given, name: _number(given, name, -2, 2),
    "frequency_penalty": lambda given, name: _number(given, name, -2, 2),
    "repetition_penalty": lambda given, name: _number(given, name, 0.01, 100),  # a factor: 0 would be no number
    "logit_bias": _logit_bias,
    "logprobs": _boolean,
    "top_logprobs": lambda given, name: _integer(given, name, minimum=0, maximum=MAX_TOP_LOGPROBS),
    "response_format": lambda given, name: Structure.parse(given[name]),
}
