"""A model that is its repository's own code: loaded, asked, stopped; and its engine with a scripted one."""

import json
import os
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pipelines.engine import Limits, Request
from pipelines.engine.query import QueryEngine, check_sampling, load_query_engine
from pipelines.engine.remote import RemoteCodeError, asking, load_remote
from pipelines.engine.remote_files import asked_for, from_folder
from pipelines.errors import StageError
from pipelines.generate import Generate
from pipelines.images.features import pack, unpack
from pipelines.images.raw import RawProcessor
from pipelines.postprocess import Postprocess
from pipelines.sampling import Sampling
from pipelines.spelling import Spelling
from pipelines.structure import Structure
from pipelines.vocabulary import Vocabulary
from tests import stand_in

LIMITS = Limits(context=2048, eos_ids=frozenset())
SPELLING = Spelling(stand_in.tokenizer())
GREEDY = Sampling(max_tokens=500, temperature=0)
TEXT = "what colour is it? 日本 <|endoftext|> 😀"
PATIENCE_S = 20


def picture(seed=0, width=7, height=5):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return stand_in.build(tmp_path_factory.mktemp("repository") / "stand.in-2")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Into which the code is copied."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(home):
    def refuse(*args):
        raise AssertionError("something is fetched")

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return load_remote(home, trust_remote_code=True)


@pytest.fixture(scope="module")
def engine(home):
    return load_query_engine(home, LIMITS, trust_remote_code=True)


def asked(name, text=TEXT, image=None, sampling=GREEDY, **fields):
    ids, features = RawProcessor(SPELLING).run(text, [image] if image else [])
    travelled = unpack(pack(features)).arrays if features else None
    return Request(name, ids, sampling, features=travelled, **fields)


def drain(engine, until=lambda outputs: False):
    """The tokens and the last output of each request."""
    tokens, last, deadline = {}, {}, time.monotonic() + PATIENCE_S
    while engine.busy:
        assert time.monotonic() < deadline, "waited in vain"
        outputs = engine.step()
        assert len({output.id for output in outputs}) == len(outputs)
        for output in outputs:
            assert output.id not in last, "an output after the last one"
            tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason:
                last[output.id] = output
        if until(tokens):
            break
        if not outputs:
            idle_s = engine.idle_s
            assert 0 <= idle_s < 0.1  # none, when something came while we looked
            time.sleep(idle_s)
    return tokens, last


def answer(engine, request):
    engine.submit(request)
    tokens, last = drain(engine)
    return SPELLING.text(tokens[request.id]), last[request.id].finish_reason


def wanted(model, text=TEXT, image=None, **given):
    told = {"max_tokens": 500, "temperature": 0, "variant": None, **given}
    return model.query(image=image, question=text, settings=told)["answer"]


# --- the repository's own code


def test_the_answer_is_what_query_gives(model, engine):
    answers = set()
    for text in (TEXT, "a", "is it red?"):
        for image in (None, picture(0), picture(1), picture(0, 5, 7)):
            assert answer(engine, asked("a", text, image)) == (wanted(model, text, image), "stop")
            answers.add(wanted(model, text, image))
    assert len(answers) > 9, "pictures and questions make a difference"


def test_pixels_come_as_they_are(model, engine):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    swapped = Image.new("RGB", (4, 4), (0, 0, 255))
    told = [answer(engine, asked("a", "hm", image))[0] for image in (red, swapped)]
    assert told == [wanted(model, "hm", red), wanted(model, "hm", swapped)]
    assert told[0] != told[1]


def test_what_the_constructor_computes_is_there(model):
    """transformers' own loading leaves it undefined."""
    assert torch.equal(model.model.turn, torch.linspace(-3, 3, 24))


def test_weights_are_the_files(model, home):
    for name, tensor in load_file(home / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_code_is_copied_into_our_cache(model):
    file = sys.modules[type(model).__module__].__file__
    assert file.startswith(os.environ["TRIPTYCH_CACHE"])


def test_refused_without_trust(home):
    with pytest.raises(RemoteCodeError, match="trust_remote_code = true") as refused:
        load_query_engine(home, LIMITS, trust_remote_code=False)
    assert "rights of this server" in str(refused.value)


def test_no_code_runs_without_trust(tmp_path):
    home = stand_in.build(tmp_path / "trap", wrapper="raise AssertionError('it ran')")
    with pytest.raises(RemoteCodeError):
        load_remote(home, trust_remote_code=False)
    RawProcessor.load(home)  # preprocess runs none in any case
    with pytest.raises(AssertionError, match="it ran"):
        load_remote(home, trust_remote_code=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("auto_map"), "names no AutoModelForCausalLM"),
        (lambda config: config["auto_map"].update(AutoModelForCausalLM="a/b--code.Model"), "another repository"),
    ],
)
def test_a_repository_that_is_none(tmp_path, change, message):
    home = stand_in.build(tmp_path / "other")
    config = json.loads((home / "config.json").read_text())
    change(config)
    (home / "config.json").write_text(json.dumps(config))
    with pytest.raises(RemoteCodeError, match=message):
        load_remote(home, trust_remote_code=True)


def test_weights_that_are_missing_are_named(tmp_path):
    home = stand_in.build(tmp_path / "lacking")
    weights = load_file(home / "model.safetensors")
    del weights["model.say.weight"]
    save_file(weights, home / "model.safetensors")
    with pytest.raises(RemoteCodeError, match=r"lack 1 of the model's: model\.say\.weight"):
        load_remote(home, trust_remote_code=True)
    (home / "model.safetensors").unlink()
    with pytest.raises(RemoteCodeError, match=r"no \*\.safetensors"):
        load_remote(home, trust_remote_code=True)


def test_a_tokenizer_that_the_code_names_is_the_folders(home, model):
    assert asked_for(home) == {"stand-in/words": home / "tokenizer.stand-in--words.json"}
    usual = Tokenizer.from_pretrained
    with from_folder(home):
        assert Tokenizer.from_pretrained("stand-in/words").to_str() == model.model.tokenizer.to_str()
        assert Tokenizer.from_pretrained != usual
    assert Tokenizer.from_pretrained == usual


def test_dtype(home):
    found = load_remote(home, trust_remote_code=True, dtype="bfloat16")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


def test_a_class_that_loads_itself_does(tmp_path):
    own = (
        stand_in.WRAPPER
        + """
    @classmethod
    def from_pretrained(cls, home, config=None, **kwargs):
        model = cls(config)
        model.loaded_from = home
        return model
"""
    )
    home = stand_in.build(tmp_path / "own", wrapper=own)
    assert load_remote(home, trust_remote_code=True).loaded_from == str(home)


# --- what its signature takes


class Older:
    """moondream2 of January 2025."""

    def query(self, image, question, stream=False):
        told = f"{question} {image.size}"
        return {"answer": iter(told.split(" ")) if stream else told}


class Plain:
    def query(self, image, question):
        return f"{question}!"


class Oldest:
    """moondream2 of 2024."""

    def encode_image(self, image):
        return image.size

    def answer_question(self, image_embeds, question, tokenizer=None, max_new_tokens=128):
        return f"{question} {image_embeds} {max_new_tokens} {tokenizer.decode(tokenizer.encode(question))}"


@pytest.mark.parametrize(
    ("older", "told"), [(Older(), "hm?(7,5)"), (Plain(), "hm?!"), (Oldest(), "hm? (7, 5) 633 hm?")]
)
def test_older_code_is_told_what_it_takes(older, told, home):
    (home / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    driven = QueryEngine(asking(older, home), SPELLING, LIMITS)
    assert answer(driven, asked("a", "hm?", picture())) == (told, "stop")
    driven.submit(asked("b", "hm?", picture(), Sampling(max_tokens=9, temperature=0.5)))
    _, last = drain(driven)
    assert "takes no 'temperature'" in last["b"].error


def test_a_model_that_cannot_be_asked(home):
    with pytest.raises(RemoteCodeError, match="neither query"):
        asking(object(), home)


# --- sampling


def test_max_tokens_is_counted_in_ids(model, engine):
    engine.submit(asked("a", image=picture(), sampling=Sampling(max_tokens=7, temperature=0)))
    tokens, last = drain(engine)
    assert (len(tokens["a"]), last["a"].finish_reason) == (7, "length")
    assert Postprocess(Vocabulary.of(stand_in.tokenizer())).full(tokens["a"]).rstrip("�") in wanted(
        model, image=picture()
    )


def test_a_model_that_counts_otherwise_is_cut_all_the_same():
    def letters(asked):
        yield from " the cat's red"[: asked.max_tokens]

    driven = QueryEngine(letters, SPELLING, LIMITS)
    assert answer(driven, asked("a", sampling=Sampling(max_tokens=4)))[1] == "length"
    assert answer(driven, asked("a")) == (" the cat's red", "stop")


def test_the_context_bounds_prompt_and_answer(home):
    ids = SPELLING.ids(TEXT)
    driven = load_query_engine(home, Limits(len(ids) + 3, frozenset()), trust_remote_code=True)
    driven.submit(asked("a", sampling=Sampling(temperature=0)))
    tokens, last = drain(driven)
    assert (len(tokens["a"]), last["a"].finish_reason) == (3, "length")
    driven = load_query_engine(home, Limits(len(ids), frozenset()), trust_remote_code=True)
    assert answer(driven, asked("a")) == ("", "length")


def test_draws_follow_the_seed(engine):
    told = [answer(engine, asked("a", sampling=Sampling(max_tokens=99, seed=seed)))[0] for seed in (1, 1, 2, 3)]
    assert told[0] == told[1]
    assert len(set(told)) > 1


def test_a_stop_string_ends_it(model, engine):
    full = wanted(model, image=picture())
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    post = Postprocess(Vocabulary.of(stand_in.tokenizer()))
    engine.submit(asked("a", image=picture(), stops_at=post.stop_checker((stop,))))
    tokens, last = drain(engine)
    assert last["a"].finish_reason == "stop"
    assert post.full(tokens["a"], (stop,)) == full[: full.index(stop)]
    assert len(tokens["a"]) < len(SPELLING.ids(full))


@pytest.mark.parametrize(
    "given",
    [
        {"logprobs": True},
        {"top_k": 5},
        {"min_p": 0.1},
        {"min_tokens": 2},
        {"ignore_eos": True},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((5, 1.0),)},
        {"response_format": Structure("json_object", "")},
    ],
)
def test_what_cannot_be_told_is_refused(given, engine):
    sampling = Sampling(max_tokens=5, **given)
    (name,) = given
    with pytest.raises(StageError) as refused:
        check_sampling(sampling)
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    engine.submit(asked("a", sampling=sampling))
    tokens, last = drain(engine)
    assert (tokens["a"], last["a"].finish_reason) == ([], "error")
    assert f"'{name}'" in last["a"].error


def test_what_can_be_told_is_taken():
    check_sampling(Sampling(max_tokens=5, temperature=0.3, top_p=0.5, seed=3, stop=("a",)))


# --- failures


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("fail", "RuntimeError: the question failed"),
        ("break", "RuntimeError: the answer failed"),
        ("leave", "SystemExit: its code wants to leave"),
    ],
)
def test_an_error_is_its_requests_alone(text, error, engine, model):
    engine.submit(asked("bad", text))
    engine.submit(asked("good", image=picture()))
    tokens, last = drain(engine)
    assert (last["bad"].finish_reason, last["bad"].error) == ("error", error)
    assert SPELLING.text(tokens["good"]) == wanted(model, image=picture())


def test_a_broken_stops_at_is_an_error(engine):
    engine.submit(asked("a", stops_at=lambda token_id: bool(1 // 0)))
    _, last = drain(engine)
    assert last["a"].error.startswith("ZeroDivisionError")


# --- with a model that says what the test lets it


class Scripted:
    """Says a piece for each that it is given; `closed` once it was told to end."""

    def __init__(self):
        self.questions = []
        self.held = []
        self.let = threading.Semaphore(0)
        self.closed = threading.Event()

    def __call__(self, asked):
        self.questions.append(asked)
        self.held.append(self.pieces(asked))  # so that nothing but a `close` ends it
        return self.held[-1]

    def pieces(self, asked):
        try:
            for number in range(1000):
                assert self.let.acquire(timeout=PATIENCE_S)
                yield f"{asked.text}{number}, "
        finally:
            self.closed.set()

    def say(self, count):
        self.let.release(count)


@pytest.fixture
def scripted():
    ask = Scripted()
    ask.engine = QueryEngine(ask, SPELLING, LIMITS)
    yield ask
    for name in list(ask.engine._jobs):
        ask.engine.cancel(name)
    ask.engine.step()
    ask.say(1000)


def test_it_streams_in_order(scripted):
    scripted.engine.submit(asked("a", "q"))
    said = ""
    for number in range(5):
        scripted.say(1)
        tokens, _ = drain(scripted.engine, lambda tokens: "a" in tokens)
        said += SPELLING.text(tokens["a"])
        assert said == "".join(f"q{each}, " for each in range(number + 1))[: len(said)]
        assert len(said) >= 4 * (number + 1) - 2, "a word is waited for, and no more"


def test_a_step_does_not_wait(scripted):
    scripted.engine.submit(asked("a", "q"))
    assert scripted.engine.step() == []
    assert scripted.engine.busy


def test_two_at_once_have_their_turns(scripted):
    for name in "ab":
        scripted.engine.submit(asked(name, name, sampling=Sampling(max_tokens=6)))
    scripted.say(8)
    tokens, last = drain(scripted.engine)
    assert [SPELLING.text(tokens[name])[0] for name in "ab"] == ["a", "b"]
    assert {name: output.finish_reason for name, output in last.items()} == {"a": "length", "b": "length"}
    assert [asked.text for asked in scripted.questions] == ["a", "b"]
    counters = scripted.engine.counters
    assert (counters.finished, counters.output_tokens, counters.running, counters.waiting) == (2, 12, 0, 0)
    assert counters.prompt_tokens == 2


def test_the_lowest_priority_is_first(scripted):
    scripted.engine.submit(asked("first", "f", sampling=Sampling(max_tokens=6)))
    while not scripted.questions:
        time.sleep(0.001)
    for name, priority in (("later", 1), ("late", 1), ("soon", -1)):
        scripted.engine.submit(asked(name, name[-1], sampling=Sampling(max_tokens=6), priority=priority))
    scripted.say(100)
    drain(scripted.engine)
    assert [asked.text for asked in scripted.questions] == ["f", "n", "r", "e"]


def test_cancel_closes_the_generator_and_the_next_has_its_turn(scripted):
    scripted.engine.submit(asked("a", "a"))
    scripted.say(3)
    drain(scripted.engine, lambda tokens: "a" in tokens)
    scripted.engine.submit(asked("b", "b", sampling=Sampling(max_tokens=6)))
    scripted.engine.submit(asked("c", "c"))
    for name in ("a", "c", "nobody"):
        scripted.engine.cancel(name)
    assert scripted.engine.idle_s == 0
    ended = {output.id: output.finish_reason for output in scripted.engine.step()}
    assert ended == {"a": "cancelled", "c": "cancelled"}
    assert not scripted.closed.is_set(), "it is told between two pieces"
    scripted.say(100)
    assert scripted.closed.wait(PATIENCE_S)
    _, last = drain(scripted.engine)
    assert last["b"].finish_reason == "length"
    assert list(last) == ["b"]
    assert [asked.text for asked in scripted.questions] == ["a", "b"], "what is cancelled before its turn is not asked"
    assert scripted.engine.counters.cancelled == 2


def test_deadlines(scripted):
    clock = [100.0]
    scripted.engine._clock = lambda: clock[0]
    scripted.engine.submit(asked("runs", "r", deadline=101.0))
    scripted.engine.submit(asked("waits", "w", deadline=102.0))
    scripted.engine.submit(asked("stays", "s", sampling=Sampling(max_tokens=6)))
    assert scripted.engine.step() == []
    clock[0] = 103.0
    ended = {output.id: output.finish_reason for output in scripted.engine.step()}
    assert ended == {"runs": "timeout", "waits": "timeout"}
    scripted.say(100)
    _, last = drain(scripted.engine)
    assert last["stays"].finish_reason == "length"


def test_an_id_in_flight_is_refused_and_free_again_afterwards(scripted):
    scripted.engine.submit(asked("a", sampling=Sampling(max_tokens=1)))
    with pytest.raises(ValueError, match="in flight"):
        scripted.engine.submit(asked("a"))
    scripted.say(100)
    drain(scripted.engine)
    scripted.engine.submit(asked("a", sampling=Sampling(max_tokens=1)))
    drain(scripted.engine)


# --- driven by the stage


def test_through_generate(home, model):
    post = Postprocess.load(home)
    stage = Generate(load_query_engine(home, LIMITS, trust_remote_code=True), stop_checker=post.stop_checker)
    told, done = {}, threading.Semaphore(0)

    def take(name):
        def answered(found):
            told[name] = found
            done.release()

        return answered

    try:
        for seed in range(4):
            request = asked(str(seed), image=picture(seed))
            stage.generate(list(request.input_ids), GREEDY, take(seed))
        for _ in range(4):
            assert done.acquire(timeout=PATIENCE_S)
    finally:
        stage.close()
    assert {post.full(found.output_ids) for found in told.values()} == {wanted(model)}
