"""How one request is sampled: the OpenAI names, validated once, the same from HTTP to the engine.

Knows no tokenizer, no torch and no HTTP; a bad value is a StageError that names its parameter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import StageError

MAX_STOPS = 4  # OpenAI: "Up to 4 sequences where the API will stop generating further tokens."
_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Sampling:
    """`max_tokens` None means: to the end of the context. `seed` None means: drawn when the request arrives."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Sampling:
        """From JSON values with the OpenAI names. A null is a parameter not given; an unknown name is an error."""
        given = {name: value for name, value in fields.items() if value is not None}
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
        values: dict[str, Any] = {name: parse(given, name) for name, parse in _PARSERS.items() if name in given}
        if "max_completion_tokens" in values:
            values["max_tokens"] = values.pop("max_completion_tokens")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sampling:
        """From the `sampling` tensor."""
        try:
            fields = json.loads(text or "{}")
        except ValueError as error:
            raise StageError(f"sampling is not valid JSON: {error}", param="sampling") from None
        if not isinstance(fields, dict):
            raise StageError("sampling must be a JSON object with the OpenAI names.", param="sampling")
        return cls.parse(fields)

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value not in (None, ())})

    def with_seed(self) -> Sampling:
        """The same with a seed: a request that gave none gets one at random."""
        if self.seed is not None:
            return self
        fields = {**asdict(self), "seed": int.from_bytes(os.urandom(7), "little")}
        return Sampling(**fields)


def _integer(fields: Mapping[str, Any], name: str, minimum: int = -_SEED_LIMIT) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise StageError(f"'{name}' must be an integer, not {_shown(value)}.", param=name)
    if not minimum <= value < _SEED_LIMIT:
        raise StageError(f"'{name}' must be at least {minimum} and below 2**63, not {value}.", param=name)
    return value


def _number(fields: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise StageError(f"'{name}' must be a number, not {_shown(value)}.", param=name)
    if not low <= value <= high:
        raise StageError(f"'{name}' must be between {low:g} and {high:g}, not {value:g}.", param=name)
    return float(value)


def _stop(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields[name]
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise StageError(f"'{name}' must be a string or a list of strings, not {_shown(value)}.", param=name)
    if len(stops) > MAX_STOPS:
        raise StageError(f"'{name}' takes at most {MAX_STOPS} strings, not {len(stops)}.", param=name)
    if any(not stop for stop in stops):
        raise StageError(f"'{name}' must not hold an empty string.", param=name)
    return tuple(stops)


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


_PARSERS = {
    "max_tokens": lambda fields, name: _integer(fields, name, minimum=1),
    "max_completion_tokens": lambda fields, name: _integer(fields, name, minimum=1),
    "temperature": lambda fields, name: _number(fields, name, 0, 2),
    "top_p": lambda fields, name: _number(fields, name, 0, 1),
    "seed": _integer,
    "stop": _stop,
}
