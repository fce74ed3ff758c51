"""What a model allows, read from its JSON files alone: the echo engine and preprocess need it without torch.

Does not know the weights, nor what a catalog entry overrides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.engine import Limits
from pipelines.model_config import context_of, read_json, text_half
from pipelines.vocabulary import Vocabulary


def read_limits(home: Path) -> Limits:
    """The context and the ids that end an answer. A ValueError names the file that does not say."""
    config = read_json(home / "config.json")
    if not config:
        raise ValueError(f"{home / 'config.json'} is missing or empty")
    text = text_half(config)
    context = context_of(text)
    if context < 1:
        raise ValueError(f"{home / 'config.json'} names no max_position_embeddings")
    return Limits(context=context, eos_ids=frozenset(_eos_ids(home, text)))


def _eos_ids(home: Path, config: dict[str, Any]) -> Iterator[int]:
    """All that any file names: a chat model's end of turn is often in one, its end of text in another."""
    generation = read_json(home / "generation_config.json").get("eos_token_id")
    named = generation if generation is not None else config.get("eos_token_id")
    yield from (named if isinstance(named, list) else [] if named is None else [named])
    settings = read_json(home / "tokenizer_config.json")
    token = settings.get("eos_token")
    if isinstance(token, dict):  # an AddedToken as it is written
        token = token.get("content")
    if isinstance(token, str) and (found := _token_id(home, settings, token)) is not None:
        yield found


def _token_id(home: Path, settings: dict[str, Any], token: str) -> int | None:
    """Where added tokens are listed; else the tokenizer is asked, which takes seconds if it is large."""
    for number, added in settings.get("added_tokens_decoder", {}).items():
        if added.get("content") == token:
            return int(number)
    file = home / "tokenizer.json"
    if not file.exists():
        return None
    if kept := Vocabulary.kept(home):
        return kept.tokens.index(token) if token in kept.tokens else None
    text = file.read_text(encoding="utf-8")
    if listed := re.search(r'"added_tokens":\s*(?=\[)', text):  # the list alone: the vocabulary is long
        for added in json.JSONDecoder().raw_decode(text, listed.end())[0]:
            if added.get("content") == token:
                return int(added["id"])
    from tokenizers import Tokenizer

    found: int | None = Tokenizer.from_str(text).token_to_id(token)
    return found
