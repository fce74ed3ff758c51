"""A model that is its repository's own code, asked in text: loading it, and the calls that moondream2 is known by.

Loaded as `AutoModelForCausalLM.from_pretrained(home, trust_remote_code=True)` finds it (`auto_map` in config.json, the
files beside it), and no other code: nothing is fetched here. It is built by calling its class: transformers 5 would
build it on no device first, where whatever such a class computes for itself comes to nothing. Knows no engine.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, dynamic_module_utils

from pipelines.engine.query import Ask, Question
from pipelines.engine.remote_files import from_folder
from pipelines.pipeline import cache_dir

log = logging.getLogger(__name__)


class RemoteCodeError(ValueError):
    """The repository's model cannot be run; the message says why."""


def load_remote(home: Path, *, trust_remote_code: bool, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model in `home`. `dtype` auto: as its code builds it, which may well rely on that."""
    if not trust_remote_code:
        raise RemoteCodeError(
            f"the model in {home} is run by code of its own, with all the rights of this server. Read its *.py files; "
            "if you trust them, write trust_remote_code = true in the pipeline's TOML file"
        )
    named = _read(home).get("auto_map") or {}
    if "AutoModelForCausalLM" not in named:
        raise RemoteCodeError(f"{home / 'config.json'} names no AutoModelForCausalLM in auto_map: it has no own code")
    dynamic_module_utils.HF_MODULES_CACHE = str(cache_dir() / "modules")  # where code is copied to, to be imported
    config_class = _class(home, named["AutoConfig"]) if "AutoConfig" in named else AutoConfig
    config = config_class.from_pretrained(str(home), local_files_only=True)
    model_class = _class(home, named["AutoModelForCausalLM"])
    with from_folder(home):
        if model_class.from_pretrained.__func__ is PreTrainedModel.from_pretrained.__func__:
            model = model_class(config)
            _fill(model, home)
        else:
            model = model_class.from_pretrained(str(home), config=config)
    kind = None if dtype == "auto" else getattr(torch, dtype)
    return model.to(device=device, dtype=kind).eval().requires_grad_(False)


def asking(model: Any, home: Path) -> Ask:
    """The model's own way to answer a question, streaming if it can; it is told what its signature takes."""
    if callable(getattr(model, "query", None)):
        return _Query(model)
    if callable(getattr(model, "answer_question", None)):
        return _AnswerQuestion(model, home)
    raise RemoteCodeError(f"the model of {home} has neither query(image, question) nor answer_question")


class _Query:
    """moondream2 since 2025: `query(image, question, reasoning, stream, settings)` gives `{"answer": …}`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = _taken(model.query)

    def __call__(self, question: Question) -> Iterator[str]:
        _check_settings(question, "settings" in self._takes)
        settings = {
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "variant": None,  # the code of June 2025 fails without it; it is no adapter
        }
        offered = {"stream": True, "reasoning": False, "settings": settings}
        _seed(question)
        told = self._model.query(
            image=question.picture,
            question=question.text,
            **{name: value for name, value in offered.items() if name in self._takes},
        )
        answer = told["answer"] if isinstance(told, Mapping) else told
        if isinstance(answer, str):
            yield answer
        else:
            yield from answer


class _AnswerQuestion:
    """moondream2 of 2024: `answer_question(encode_image(image), question, tokenizer)` gives a text."""

    def __init__(self, model: Any, home: Path) -> None:
        self._model = model
        takes = _taken(model.answer_question)
        self._given: dict[str, Any] = {}
        if "tokenizer" in takes:
            self._given["tokenizer"] = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
        self._takes_most = "max_new_tokens" in takes

    def __call__(self, question: Question) -> Iterator[str]:
        _check_settings(question, False)
        if question.picture is None:
            raise RemoteCodeError("this model answers questions about a picture: send one")
        most = {"max_new_tokens": question.max_tokens} if self._takes_most else {}
        _seed(question)
        encoded = self._model.encode_image(question.picture)
        yield str(self._model.answer_question(encoded, question.text, **self._given, **most))


def _check_settings(question: Question, takes: bool) -> None:
    """Where they cannot be told, only what changes nothing or asks for the likeliest is taken."""
    if not takes and (question.temperature not in (0, 1) or question.top_p != 1):
        raise RemoteCodeError("this model's code takes no 'temperature' and no 'top_p': leave them out")


def _seed(question: Question) -> None:
    """Its code draws from torch's own generator."""
    if question.seed is not None:
        torch.manual_seed(question.seed)


def _taken(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _class(home: Path, reference: str) -> Any:
    if "--" in reference:
        raise RemoteCodeError(f"auto_map in {home / 'config.json'} names code of another repository: {reference}")
    return dynamic_module_utils.get_class_from_dynamic_module(reference, str(home), local_files_only=True)


def _fill(model: Any, home: Path) -> None:
    """The weights, in the dtypes that the model has."""
    files = sorted(home.glob("*.safetensors"))
    if not files:
        raise RemoteCodeError(f"{home} holds no *.safetensors")
    own = dict(model.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    unknown: set[str] = set()
    for file in files:
        weights = load_file(file)
        unknown.update(model.load_state_dict(weights, strict=False).unexpected_keys)
        filled.update(own[name].data_ptr() for name in weights if name in own)
    lacking = [name for name, tensor in own.items() if tensor.data_ptr() not in filled]  # one may have several names
    if lacking:
        raise RemoteCodeError(f"the weights in {home} lack {len(lacking)} of the model's: {', '.join(lacking[:3])}, …")
    if unknown:
        log.warning(
            "%d weights in %s are none of the model's: %s, …", len(unknown), home, ", ".join(sorted(unknown)[:3])
        )


def _read(home: Path) -> dict[str, Any]:
    try:
        found = json.loads((home / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RemoteCodeError(f"{home / 'config.json'} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
