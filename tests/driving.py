"""Driving an engine by hand: requests in, and all that comes out until nothing is left."""

from pathlib import Path

from tokenizers import Tokenizer

from pipelines.engine import Limits, Request
from pipelines.engine.batched import BatchedEngine
from pipelines.sampling import Sampling
from tests.models import CONTEXT, build


def greedy(max_tokens, **fields):
    return Sampling(max_tokens=max_tokens, temperature=0, **fields)


def engine(model, *, eos=(), context=CONTEXT, **options):
    """Of a model, or of a fresh one of this name."""
    model = build(model) if isinstance(model, str) else model
    return BatchedEngine(model, Limits(context, frozenset(eos)), **options)


def tokenizer_of(home: Path) -> Tokenizer:
    """As the stages read it, in a quarter of the time that transformers takes."""
    return Tokenizer.from_file(str(home / "tokenizer.json"))


def drain(driven, into=None):
    """All until nothing is left: the tokens of each request, and its last output."""
    tokens, last = into if into is not None else ({}, {})
    while driven.busy:
        collect(driven.step(), (tokens, last))
    return tokens, last


def collect(outputs, into):
    for output in outputs:
        assert output.id not in into[1], "an output after the last one"
        into[0].setdefault(output.id, []).extend(output.token_ids)
        if output.finish_reason:
            into[1][output.id] = output


def answer(driven, input_ids, sampling, stops_at=None):
    driven.submit(Request("only", input_ids, sampling, stops_at))
    tokens, last = drain(driven)
    return tokens["only"], last["only"].finish_reason
