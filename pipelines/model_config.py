"""A model's own `config.json`, as far as more than one part of the product reads it. Knows no engine and no numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# max_position_embeddings by its other names, in configs that keep an older architecture's own words.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def read_context(home: Path) -> int:
    """How many tokens the model in `home` takes; 0 where no file says, which is no error."""
    try:
        return context_of(text_half(read_json(home / "config.json")))
    except ValueError:
        return 0


def text_half(config: dict[str, Any]) -> dict[str, Any]:
    """Of a vision model's config."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def context_of(config: Mapping[str, Any]) -> int:
    return next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), 0)


def read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object")
    return found
