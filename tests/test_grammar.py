"""Structured answers: what is refused and why, and that what a model says under one always is one."""

import json
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.constraint import Constraints
from pipelines.engine import Request
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.weights import load
from pipelines.errors import StageError
from pipelines.preprocess import Preprocess
from pipelines.sampling import Sampling
from pipelines.structure import Structure
from pipelines.trial import check
from pipelines.vocabulary import Vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "ünïcode"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": ["boolean", "null"]},
                "left": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
            },
            "required": ["value", "left"],
            "additionalProperties": False,
        },
        "leaf": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "maxItems": 4},
    },
    "$ref": "#/$defs/node",
}
KINDS = [
    {
        "type": "object",
        "properties": {"kind": {"const": kind}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    for kind in "ab"
]
DATED = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
        "one": {"oneOf": KINDS},
    },
    "required": ["day", "code"],
    "additionalProperties": False,
}


def of_schema(schema):
    return Structure("json_schema", json.dumps(schema))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2(smollm2_home):
    """The real model, its tokenizer, and what follows structures for it."""
    model, limits = load(smollm2_home)
    tokenizer = Tokenizer.from_file(str(smollm2_home / "tokenizer.json"))
    return model, limits, tokenizer, Constraints(Vocabulary.load(smollm2_home), limits.eos_ids)


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (of_schema({"type": "objekt"}), "objekt"),
        (of_schema({"not": {"type": "string"}}), r'\["not"\]'),
        (of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (of_schema({"if": {}, "then": {}}), r'\["if", "then"\]'),
        (of_schema({"type": "string", "format": "zzz"}), "Unknown format: zzz"),
        (of_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (of_schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
        (of_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (of_schema({"$ref": "#/$defs/none"}), "does not exist"),
        (of_schema({"$ref": "http://localhost/x"}), "http://localhost/x"),
        (of_schema({"$ref": "#"}), "cannot be followed"),
        (of_schema({"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
        (of_schema({"items": [{"type": "object", "minProperties": 3, "required": ["a"]}]}), "minProperties.: 3 with 1"),
        (of_schema({"type": "string", "pattern": "\ud800"}), "cannot be followed"),
        (Structure("regex", "a(b"), "unclosed group"),
        (Structure("regex", "\ud800"), "cannot be followed"),
        (Structure("regex", "((a{1000}){1000}){1000}"), "cannot be followed"),
        (Structure("grammar", 'start: "a" b'), 'unknown name: "b"'),
        (Structure("grammar", "start: <|nobody|>"), "unknown special token"),
        (Structure("grammar", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'), r'\["not"\]'),
        (Structure("grammar", "start: x\nx[temperature=0.5]: /a/"), "temperature"),
    ],
    ids=lambda value: value.source[:30] if isinstance(value, Structure) else "",
)
def test_what_cannot_be_followed_is_refused_by_name(structure, says):
    with pytest.raises(StageError, match=says) as refused:
        check(structure)
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_request")
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    "structure",
    [
        of_schema({"allOf": [{"type": "string", "pattern": f"a{number}.*b"} for number in range(100)]}),
        Structure("grammar", "start: r0\n" + "\n".join(f'r{n}: "x" r{n + 1}' for n in range(8000)) + '\nr8000: "b"'),
    ],
    ids=["takes minutes", "overflows the stack"],
)
def test_a_hostile_structure_harms_nobody(structure):
    with pytest.raises(StageError, match="too large, too deeply nested or too complex"):
        check(structure)


@pytest.mark.parametrize(
    "structure",
    [
        Structure("json_object"),
        of_schema(PERSON),
        of_schema(TREE),
        of_schema(DATED),
        of_schema(
            {"type": "object", "properties": {"minProperties": {"const": 3}, "x": {"enum": [{"x-guidance": 1}]}}}
        ),
        Structure("regex", r"\d{3}|é+"),
        Structure("grammar", "start: <|im_end|>"),
    ],
    ids=lambda structure: structure.source[:30],
)
def test_what_can_be_followed_is_taken(structure):
    check(structure, ("<|im_end|>",))


def test_preprocess_refuses_what_cannot_be_followed_and_what_is_no_token(smollm2_home):
    stage = Preprocess.load(smollm2_home, context=64)
    wanted = {"response_format": {"type": "grammar", "grammar": "start: <|im_end|>"}, "logit_bias": {"49151": 1}}
    assert stage.run(text="a", sampling=json.dumps(wanted)).sampling.response_format.kind == "grammar"
    for wrong, says in (
        ({"response_format": {"type": "regex", "regex": "("}}, "unclosed"),
        ({"logit_bias": {"49152": 1}}, "tokens are 0 to 49151"),
        ({"min_tokens": 64}, "reduce min_tokens"),
    ):
        with pytest.raises(StageError, match=says) as refused:
            stage.run(text="a", sampling=json.dumps(wrong))
        assert [refused.value.param] == list(wrong)


def test_a_trial_needs_neither_torch_nor_numpy():
    code = "import sys, pipelines.trial; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())


def follow(constraint, choose, limit=400):
    """The tokens of a walk that `choose` picks of what is allowed, until it is complete."""
    taken = []
    while not constraint.complete and len(taken) < limit:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        taken.append(choose(np.flatnonzero(bits).tolist()))
        constraint.accept(taken[-1])
    return taken


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([PERSON, TREE, DATED]))
def test_whatever_is_chosen_follows_the_schema(smollm2, random, schema):
    _, limits, tokenizer, constraints = smollm2
    taken = follow(constraints(of_schema(schema)), random.choice)
    assert len(taken) < 400
    text = tokenizer.decode([token for token in taken if token not in limits.eos_ids], skip_special_tokens=False)
    jsonschema.validate(json.loads(text), schema)
    assert "\n" not in text


def test_all_end_ids_end(smollm2, smollm2_home):
    constraint = Constraints(Vocabulary.load(smollm2_home), [0, 2, 10**6])(Structure("regex", "a+"))
    constraint.accept(smollm2[2].token_to_id("a"))
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert bits[[0, 2]].all()
    assert not constraint.complete
    constraint.accept(2)
    assert constraint.complete


def test_a_model_without_an_end_id_ends_where_nothing_may_follow(smollm2, smollm2_home):
    tokenizer = smollm2[2]
    constraint = Constraints(Vocabulary.load(smollm2_home), [])(Structure("regex", "a|ab"))
    constraint.accept(tokenizer.token_to_id("a"))
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [tokenizer.token_to_id("b")]
    constraint.accept(tokenizer.token_to_id("b"))
    assert constraint.complete


def test_a_token_that_is_not_allowed_is_an_error(smollm2):
    constraint = smollm2[3](Structure("regex", "abc"))
    with pytest.raises(StageError, match="cannot be followed"):
        constraint.accept(5)


def test_a_grammar_deeper_than_a_thread_is_followed(smollm2):
    """What `check` would refuse, but never the end of the process that generates for others."""
    rules = "\n".join(f'r{number}: "x" r{number + 1}' for number in range(5000))
    constraint = smollm2[3](Structure("grammar", f'start: r0\n{rules}\nr5000: "b"'))
    assert constraint.mask().any()


def generate(smollm2, requests):
    """Each structure with its sampling, all at once: the texts and how they ended."""
    model, limits, tokenizer, constraints = smollm2
    engine = BatchedEngine(model, limits, max_running=len(requests))
    prompt = tokenizer.encode("<|im_start|>user\nDescribe a person as JSON.<|im_end|>\n<|im_start|>assistant\n").ids
    for number, (structure, sampling) in enumerate(requests):
        engine.submit(Request(str(number), prompt, sampling, constraint=constraints(structure) if structure else None))
    ids, ends = {}, {}
    while engine.busy:
        for output in engine.step():
            ids.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason:
                ends[output.id] = (output.finish_reason, output.error)
    texts = [
        tokenizer.decode(
            [token for token in ids[str(number)] if token not in limits.eos_ids], skip_special_tokens=False
        )
        for number in range(len(requests))
    ]
    return texts, [ends[str(number)] for number in range(len(requests))]


def test_a_model_answers_as_the_schema_says(smollm2):
    """Temperature 1 and more: what it would rather say does not matter."""
    requests = [
        (of_schema(schema), Sampling(max_tokens=200, seed=seed, temperature=1 + seed / 4))
        for schema in (PERSON, TREE, DATED)
        for seed in range(3)
    ]
    requests.append((None, Sampling(max_tokens=30, seed=1)))
    texts, ends = generate(smollm2, requests)
    for (structure, _), text, end in zip(requests[:-1], texts, ends, strict=False):
        assert end == ("stop", "")
        jsonschema.validate(json.loads(text), json.loads(structure.source))


def test_a_model_answers_as_a_regex_and_a_grammar_say(smollm2):
    regex = r"(yes|no), because [a-z ]{5,20}\."
    grammar = 'start: item (", " item)*\nitem: /[A-Z][a-z]{1,5}/ " (" /[0-9]{1,3}/ ")"'
    listed = r"[A-Z][a-z]{1,5} \([0-9]{1,3}\)(, [A-Z][a-z]{1,5} \([0-9]{1,3}\))*"
    hot = {"max_tokens": 300, "temperature": 1.5}
    requests = [(Structure("regex", regex), Sampling(seed=seed, **hot)) for seed in range(3)]
    requests += [(Structure("grammar", grammar), Sampling(seed=seed, **hot)) for seed in range(3)]
    requests.append((Structure("regex", "(a|b){20}"), Sampling(seed=1, ignore_eos=True, min_tokens=40, **hot)))
    texts, ends = generate(smollm2, requests)
    for text, (reason, error) in zip(texts[:3], ends, strict=False):
        assert (bool(re.fullmatch(regex, text)), reason, error) == (True, "stop", "")
    for text, (reason, error) in zip(texts[3:6], ends[3:], strict=False):
        assert error == ""
        assert reason == "length" or re.fullmatch(listed, text)
    assert re.fullmatch("(a|b){20}", texts[-1])
    assert ends[-1] == ("stop", "")


def test_an_object_is_json(smollm2):
    requests = [(Structure("json_object"), Sampling(max_tokens=250, seed=seed, temperature=0.8)) for seed in range(4)]
    texts, ends = generate(smollm2, requests)
    finished = [text for text, (reason, _) in zip(texts, ends, strict=True) if reason == "stop"]
    assert finished  # an object may be longer than any limit
    assert all(isinstance(json.loads(text), dict) for text in finished)
