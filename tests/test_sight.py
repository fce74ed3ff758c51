"""The engine on prompts with pictures: each system answers as transformers' own processor and `generate` do."""

import numpy as np
import pytest
import torch
from jinja2 import Template

from pipelines.engine import Limits, Request, batched, weights
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.flat import FlatModel, Sample
from pipelines.engine.sight import tensors
from pipelines.engine.slots import Unsupported
from pipelines.images.processor import Processor
from tests import vision
from tests.driving import collect, drain, greedy

SIZES = [(40, 40), (61, 47), (33, 90), (120, 50), (64, 64), (50, 35)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=vision.NAMES)
def system(request, tmp_path_factory):
    return System(request.param, tmp_path_factory.mktemp(request.param))


class System:
    """One of the five on disk, its prompts and its answers."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = vision.home(name, folder)
        self.processor = Processor.load(self.folder)
        self._wanted = {}

    def rendered(self, text, *seeds):
        """The prompt, and its pictures."""
        parts = [{"type": "image"}] * len(seeds) + [{"type": "text", "text": text}]
        template = Template(vision.TEMPLATES[self.name])
        rendered = template.render(messages=[{"role": "user", "content": parts}], add_generation_prompt=True)
        return rendered, [vision.picture(seed, SIZES[seed]) for seed in seeds]

    def prompt(self, text, *seeds):
        """Rendered, and what the model's processor makes of it."""
        rendered, pictures = self.rendered(text, *seeds)
        made = vision.inputs(self.folder, rendered, pictures)
        ids = made["input_ids"][0].tolist()
        features = {name: value.numpy() for name, value in made.items() if name not in ("input_ids", "attention_mask")}
        return rendered, pictures, ids, features if seeds else None

    def engine(self, **options):
        _, _, ids, features = self.prompt("What is it?", 0)
        model = vision.model(self.folder)
        return BatchedEngine(model, Limits(1024, frozenset()), sample=Sample(ids, features), **options)

    def request(self, name, text, *seeds, count=12):
        rendered, pictures, ids, features = self.prompt(text, *seeds)
        found = self.processor.run(rendered, pictures)[1]
        return Request(name, ids, greedy(count), features=features, identity=found.identity if found else None)

    def wanted(self, text, *seeds, count=12):
        asked = (text, seeds, count)
        if asked not in self._wanted:
            self._wanted[asked] = vision.reference(self.folder, *self.rendered(text, *seeds), count)
        return self._wanted[asked]


CASES = {
    "text": ("Hello there, you.",),
    "one": ("What is this thing?", 0),
    "another": ("What is this thing?", 1),
    "two": ("Which of them?", 2, 3),
    "three": ("And of these three?", 4, 0, 5),
}


def cases(system):
    """Kosmos-2 reads one picture, and completes no text without one."""
    return {name: case for name, case in CASES.items() if system.name != "kosmos2" or len(case) == 2}


def test_alone_and_together_it_answers_as_generate_does(system):
    """Text, one picture, several, first each alone, then all in one batch with rows that come and go."""
    driven, wanted = system.engine(), {name: system.wanted(*case) for name, case in cases(system).items()}
    assert driven.way == "fast"
    assert len({tuple(answer) for answer in wanted.values()}) == len(wanted), "pictures must change the answer"
    for name, case in cases(system).items():
        driven.submit(system.request(name, *case))
        assert drain(driven)[0] == {name: wanted[name]}
    into = ({}, {})
    fresh = system.engine()
    for name, case in cases(system).items():
        fresh.submit(system.request(name, *case))
        collect(fresh.step(), into)
    assert drain(fresh, into)[0] == wanted


def test_chunks_cut_pictures_anywhere(system):
    """Beside a row that decodes, a prompt comes a few tokens a step, and what its picture is to them likewise."""
    driven, into = system.engine(), ({}, {})
    driven._scheduler.beside = lambda decoding: 5
    driven.submit(system.request("first", *CASES["one"], count=40))
    collect(driven.step(), into)
    driven.submit(system.request("another", *CASES["another"]))
    tokens, _ = drain(driven, into)
    assert tokens["another"] == system.wanted(*CASES["another"])
    assert tokens["first"] == system.wanted(*CASES["one"], count=40)


def test_a_picture_seen_before_is_not_looked_at_again(system, monkeypatch):
    """The same picture shares what was computed, another one does not, though their tokens are the same."""
    driven, looked = system.engine(), []
    sight = driven._forward._sight
    monkeypatch.setattr(sight, "look", lambda ids, features, look=sight.look: looked.append(1) or look(ids, features))
    cached = {}
    for name, text, seed in [
        ("a", "Which thing is this?", 0),
        ("b", "Which thing is this one?", 0),
        ("c", "Which thing?", 1),
    ]:
        driven.submit(system.request(name, text, seed))
        tokens = {}
        while driven.busy:
            for output in driven.step():
                cached.setdefault(name, output.cached_tokens)
                tokens.setdefault(name, []).extend(output.token_ids)
        assert tokens[name] == system.wanted(text, seed)
    assert cached["b"] > cached["c"]
    assert len(looked) == 2


def test_a_row_that_has_to_wait_again_looks_again(system):
    """Room for one answer and some: the later row gives its place up in the midst of its own, and answers the same."""
    count = 80
    lengths = [len(system.prompt(*CASES[name])[2]) + count for name in ("one", "another")]
    driven, into = system.engine(), ({}, {})
    driven._scheduler.capacity = sum(-(-length // 64) * 64 for length in lengths) - 64
    for name in ("one", "another"):
        driven.submit(system.request(name, *CASES[name], count=count))
    drain(driven, into)
    assert driven.counters.preempted > 0
    for name in ("one", "another"):
        assert into[0][name] == system.wanted(*CASES[name], count=count)


def test_a_picture_that_fits_no_prompt_ends_its_request_alone(system):
    good, bad = system.request("good", *CASES["one"]), system.request("bad", *CASES["another"])
    bad.features = {name: array[:, :-1] for name, array in bad.features.items()}
    driven = system.engine()
    driven.submit(bad)
    driven.submit(good)
    tokens, last = drain(driven)
    assert last["bad"].finish_reason == "error"
    assert last["bad"].error
    assert tokens["good"] == system.wanted(*CASES["one"])


def test_models_that_cannot_be_run_flat_see_too(system, monkeypatch):
    """The compatible way, as for models whose pictures attend both ways. (Kosmos-2's own `generate` is not a loop.)"""
    if system.name == "kosmos2":
        return

    def cannot(*_, **__):
        raise Unsupported("its pictures attend both ways")

    monkeypatch.setattr(batched, "FlatModel", cannot)
    driven = system.engine()
    assert driven.way == "compatible: its pictures attend both ways"
    for name, case in CASES.items():
        driven.submit(system.request(name, *case))
    assert drain(driven)[0] == {name: system.wanted(*case) for name, case in CASES.items()}


def test_rounded_steps_know_what_is_behind_a_picture(system):
    """As a GPU's graphs run them: positions in the slot, and places as the model is told."""
    _, _, ids, features = system.prompt(*CASES["one"])
    driven = system.engine()
    flat = driven._forward
    rounded = FlatModel(flat._model, max_slots=8, context=1024, graphs=True, sample=Sample(ids, features))
    driven._forward = driven._scheduler.cache = rounded
    for name in ("one", "another"):
        driven.submit(system.request(name, *CASES[name]))
    assert drain(driven)[0] == {name: system.wanted(*CASES[name]) for name in ("one", "another")}


def test_a_wrong_sample_is_found_when_it_is_loaded(tmp_path, monkeypatch):
    """What is proved is the picture too: a flat pass that leaves the pieces out is off."""
    system = System("llava", tmp_path)
    monkeypatch.setattr("pipelines.engine.sight.Sight._replaced", lambda self, kwargs: kwargs)
    driven = system.engine()
    assert driven.way.startswith("compatible: llama answers differently as a batch")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_it_answers_as_the_quantised_model_does(tmp_path, quantize):
    """Qwen3-VL's linear layers as codes, those of its eyes too."""
    if weights.swap_here() is None:
        pytest.skip("neither the native kernels nor AVX-512 here")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    system = System("qwen3_vl", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setitem(vision.TEXT, name, value)
        patch.setitem(vision.QWEN_EYES, "out_hidden_size", 64)
        system.folder = vision.home("qwen3_vl", tmp_path / "wide")
    _, _, ids, features = system.prompt(*CASES["two"])
    model, limits = weights.load(system.folder, quantize=quantize, pictures=True)
    assert not [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    with torch.inference_mode():
        made = {"input_ids": torch.tensor([ids]), **tensors(model, features)}
        wanted = model.generate(**made, do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
        exact = vision.model(system.folder)(**made | tensors(vision.model(system.folder), features)).logits[0, -1]
        found = model(**made).logits[0, -1]
    assert float((found - exact).abs().max() / exact.abs().max()) < (0.1 if quantize == "int8" else 1)
    driven = BatchedEngine(model, limits, sample=Sample(*system.prompt("What?", 1)[2:]))
    driven.submit(Request("two", ids, greedy(12), features=features))
    assert drain(driven)[0] == {"two": wanted}
    assert np.isfinite(found.numpy()).all()
