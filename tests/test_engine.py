"""The transformers engine: it must answer as `model.generate` does, whatever runs beside, and survive what fails."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.engine import Limits, Request, attention, batched, native
from pipelines.engine import slots as slots_module
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.limits import read_limits
from pipelines.engine.scheduler import ALONE, BESIDE
from pipelines.engine.weights import load
from pipelines.sampling import Sampling
from tests.driving import answer, collect, drain, engine, greedy, tokenizer_of
from tests.models import COMPATIBLE, CONTEXT, FAST, SIZES, build, prompt, reference


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from more, and lose much where cores are busy: threads spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAST)
def fast(request):
    """The name of a model, and that model with its own attention, to compare with."""
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.filterwarnings("error::FutureWarning")  # what transformers will no longer take: a cache by its old name
def test_alone_it_answers_as_generate_does(fast):
    name, model = fast
    driven = engine(name)
    assert driven.way == "fast"
    for length in (1, 5, 20, 290):  # shorter and longer than the window of 6; the last crosses a growth at 512
        wanted = reference(model, prompt(length), 24)
        assert len(set(wanted)) > 5, "a model that repeats itself shows nothing"
        assert answer(driven, prompt(length), greedy(24)) == (wanted, "length")


def test_with_others_that_come_and_go_it_answers_as_generate_does(fast):
    """Arrivals at different steps, chunks of long prompts beside rows that decode, two cancels, a queue."""
    name, model = fast
    driven, into = engine(name, max_running=4), ({}, {})
    lengths = {"a": 3, "b": 40, "c": 9, "d": 270, "e": 1, "f": 17, "g": 30}
    for step, name in enumerate(lengths):
        driven.submit(Request(name, prompt(lengths[name]), greedy(12 + 4 * step)))
        for _ in range(3):
            collect(driven.step(), into)
        if name in "df":
            driven.cancel("b" if name == "d" else "f")
    drain(driven, into)
    tokens, last = into
    for step, (name, length) in enumerate(lengths.items()):
        wanted = reference(model, prompt(length), 12 + 4 * step)
        if last[name].finish_reason == "cancelled":
            assert tokens[name] == wanted[: len(tokens[name])]
        else:
            assert (tokens[name], last[name].finish_reason) == (wanted, "length")
    assert sorted(name for name in last if last[name].finish_reason == "cancelled") == ["b", "f"]
    counters = driven.counters
    assert (counters.finished, counters.cancelled, counters.running, counters.waiting) == (5, 2, 0, 0)
    assert counters.output_tokens == sum(len(ids) for ids in tokens.values())
    assert counters.steps < counters.output_tokens <= counters.step_rows  # which has the chunks of prompts too
    assert counters.step_ns > 0


def test_what_is_shared_is_not_computed_again_and_changes_nothing(fast):
    """Four answers to one prompt at once, a conversation that goes on, and another with the same beginning."""
    name, model = fast
    driven, into, cached = engine(name, max_running=3), ({}, {}), {}

    def collect_cached():
        outputs = driven.step()
        for output in outputs:
            cached.setdefault(output.id, output.cached_tokens)
        collect(outputs, into)

    begun = prompt(70)
    for choice in range(4):
        driven.submit(Request(f"choice {choice}", begun, greedy(10)))
    while driven.busy:
        collect_cached()
    history = begun + into[0]["choice 0"] + prompt(5)
    other = begun[:50] + prompt(30, seed=1)
    driven.submit(Request("goes on", history, greedy(10)))
    driven.submit(Request("other", other, greedy(10)))
    while driven.busy:
        collect_cached()
    tokens, _ = into
    assert cached == {"choice 0": 0, "goes on": 79, "other": 50} | {f"choice {choice}": 69 for choice in (1, 2, 3)}
    wanted = reference(model, begun, 10)
    assert [tokens[f"choice {choice}"] for choice in range(4)] == [wanted] * 4
    assert tokens["goes on"] == reference(model, history, 10)
    assert tokens["other"] == reference(model, other, 10)
    assert driven.counters.cached_tokens == sum(cached.values())


def test_with_little_room_some_wait_and_answer_the_same(fast):
    name, model = fast
    room = slots_module.position_bytes(model.config, torch.float32) * 192
    driven = engine(name, kv_bytes=room)
    assert driven.limits.context == 192
    for number in range(4):  # room is counted in parts of 64: each begins with one, and comes to need two
        driven.submit(Request(str(number), prompt(50, number), greedy(25 + number)))
    tokens, last = drain(driven)
    for number in range(4):
        assert tokens[str(number)] == reference(model, prompt(50, number), 25 + number)
    assert {output.finish_reason for output in last.values()} == {"length"}
    assert driven.counters.preempted > 0


@pytest.mark.parametrize("name", COMPATIBLE)
def test_a_model_that_slots_cannot_run_answers_as_generate_does_all_the_same(name):
    driven, model, into = engine(name, max_running=3), build(name), ({}, {})
    assert driven.way.startswith("compatible: ")
    lengths = {"a": 3, "b": 40, "c": 9, "d": 1}
    for which, length in lengths.items():
        driven.submit(Request(which, prompt(length), greedy(14)))
        collect(driven.step(), into)
    driven.cancel("b")
    tokens, last = drain(driven, into)
    for which, length in lengths.items():
        wanted = reference(model, prompt(length), 14)
        assert len(set(wanted)) > 3
        assert tokens[which] == wanted[: len(tokens[which])]
        assert last[which].finish_reason == ("cancelled" if which == "b" else "length")
    assert not driven._forward._states


def test_why_a_model_is_not_run_the_fast_way_is_said():
    assert engine("mamba").way == "compatible: mamba has layers that slots cannot cache: linear_attention"
    assert engine("bloom").way == "compatible: bloom has attention of its own making"
    assert engine("gpt_oss").way == "compatible: its attention takes s_aux"


def test_what_a_model_hands_on_unset_is_no_reason():
    """The compiled step, which asks the same, once refused every mixture of experts for a false flag."""
    layer = SimpleNamespace(window=None)
    assert not attention.why_not(layer, None, None, {"output_router_logits": False, "s_aux": None, "dropout": 0.0})
    assert attention.why_not(layer, None, None, {"s_aux": torch.ones(2), "b": True}) == "its attention takes b, s_aux"
    assert "masks" in attention.why_not(layer, None, 6, {})


def test_a_model_that_answers_differently_as_a_batch_is_not_run_as_one():
    class Shifted(LlamaForCausalLM):
        def forward(self, position_ids=None, **rest):
            return super().forward(position_ids=position_ids * 2 if position_ids is not None else None, **rest)

    torch.manual_seed(0)
    driven = BatchedEngine(Shifted(LlamaConfig(**SIZES)), Limits(CONTEXT, frozenset()))
    assert "off by" in driven.way


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch():
    samplings = {
        str(seed): Sampling(max_tokens=20, temperature=0.3 * seed, top_p=1 - 0.1 * seed, seed=seed)
        for seed in range(1, 6)
    }
    alone = {name: answer(engine("llama"), prompt(8), sampling)[0] for name, sampling in samplings.items()}
    driven, into = engine("llama"), ({}, {})
    for name, sampling in samplings.items():
        driven.submit(Request(name, prompt(8), sampling))
        collect(driven.step(), into)
    assert drain(driven, into)[0] == alone
    assert len({tuple(ids) for ids in alone.values()}) > 1


def test_a_seed_gives_the_same_answer_to_one_that_had_to_wait_again(llama):
    sampling = Sampling(max_tokens=80, temperature=1, seed=5)
    alone = answer(engine("llama"), prompt(30), sampling)[0]
    driven = engine("llama", kv_bytes=slots_module.position_bytes(llama.config, torch.float32) * 128)
    driven.submit(Request("other", prompt(29), greedy(90)))
    driven.submit(Request("only", prompt(30), sampling))
    assert drain(driven)[0]["only"] == alone
    assert driven.counters.preempted


def test_a_request_without_a_seed_gets_one():
    assert len(answer(engine("llama"), prompt(4), Sampling(max_tokens=5))[0]) == 5


def test_an_end_token_stops_and_is_part_of_the_answer(llama):
    wanted = reference(llama, prompt(7), 30)
    end = wanted[5]
    cut = wanted[: wanted.index(end) + 1]
    assert answer(engine("llama", eos=[end]), prompt(7), greedy(30)) == (cut, "stop")
    assert answer(engine("llama", eos=[end]), prompt(7), greedy(30, ignore_eos=True)) == (wanted, "length")


def test_a_stop_string_stops_with_the_token_that_completes_it(llama):
    wanted, seen = reference(llama, prompt(7), 30), []

    def stops_at(token_id):
        seen.append(token_id)
        return len(seen) == 4

    assert answer(engine("llama"), prompt(7), greedy(30), stops_at) == (wanted[:4], "stop")
    assert seen == wanted[:4]


def test_the_context_bounds_prompt_and_answer_together(llama):
    wanted = reference(llama, prompt(7), 9)
    assert answer(engine("llama", context=16), prompt(7), Sampling(temperature=0)) == (wanted, "length")
    assert answer(engine("llama", context=16), prompt(7), greedy(100)) == (wanted, "length")
    assert answer(engine("llama", context=16), prompt(15), greedy(100))[1] == "length"


@pytest.mark.parametrize("length", [0, 16, 17])
def test_a_prompt_that_does_not_fit_is_its_own_error(llama, length):
    driven = engine("llama", context=16)
    driven.submit(Request("bad", prompt(length), greedy(3)))
    driven.submit(Request("good", prompt(4), greedy(3)))
    tokens, last = drain(driven)
    assert last["bad"].finish_reason == "error"
    assert "takes 1 to 15" in last["bad"].error
    assert tokens["good"] == reference(llama, prompt(4), 3)
    assert (driven.counters.finished, driven.counters.prompt_tokens) == (2, 4)


def test_rows_are_bounded_and_the_others_wait_in_order():
    driven = engine("llama", max_running=2)
    for name in "abc":
        driven.submit(Request(name, prompt(3), greedy(2)))
    assert [output.id for output in driven.step()] == ["a", "b"]
    assert (driven.counters.running, driven.counters.waiting) == (2, 1)
    assert [output.id for output in driven.step()] == ["a", "b"]
    assert [output.id for output in driven.step()] == ["c"]


def test_a_long_prompt_comes_in_beside_rows_that_get_a_token_each_step(llama):
    driven = engine("llama")
    driven.submit(Request("runs", prompt(3), greedy(50)))
    driven.step()
    driven.submit(Request("long", prompt(5 * BESIDE), greedy(3)))
    for _ in range(4):
        assert [output.id for output in driven.step()] == ["runs"]
    assert [output.id for output in driven.step()] == ["runs", "long"]
    assert drain(driven)[0]["long"] == reference(llama, prompt(5 * BESIDE), 3)[1:]
    driven.submit(Request("alone", prompt(ALONE + 1), greedy(3)))
    assert [driven.step(), [output.id for output in driven.step()]] == [[], ["alone"]]


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits():
    now = 100.0
    driven = engine("llama", max_running=1, clock=lambda: now)
    driven.submit(Request("runs", prompt(3), greedy(50), deadline=107.0))
    driven.submit(Request("waits", prompt(4), greedy(50), deadline=105.0))
    driven.submit(Request("patient", prompt(5), greedy(5)))
    assert [output.id for output in driven.step()] == ["runs"]
    now = 106.0
    assert [(output.id, output.finish_reason) for output in driven.step()] == [("waits", "timeout"), ("runs", "")]
    now = 107.0
    outputs = [(output.id, output.finish_reason) for output in driven.step()]
    assert outputs == [("runs", "timeout"), ("patient", "")]
    drain(driven)
    assert (driven.counters.finished, driven.counters.cancelled) == (3, 0)


def test_the_lowest_priority_number_goes_first():
    driven = engine("llama", max_running=1)
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", -1)]:
        driven.submit(Request(name, prompt(3), greedy(1), priority=priority))
    assert "".join(drain(driven)[0]) == "dacb"


def test_cancel_waiting_running_and_unknown():
    driven = engine("llama", max_running=1)
    for name in "ab":
        driven.submit(Request(name, prompt(3), greedy(50)))
    driven.step()
    for name in ("a", "b", "nobody"):
        driven.cancel(name)
    assert [(output.id, output.finish_reason) for output in driven.step()] == [("a", "cancelled"), ("b", "cancelled")]
    assert not driven.busy
    assert driven.step() == []
    driven.submit(Request("a", prompt(3), greedy(1)))
    with pytest.raises(ValueError, match="in flight"):
        driven.submit(Request("a", prompt(3), greedy(1)))


class Failing(LlamaForCausalLM):
    """Fails every forward in which the token 96 is."""

    def forward(self, input_ids=None, **rest):
        if (input_ids == 96).any():
            raise RuntimeError("token 96")
        return super().forward(input_ids=input_ids, **rest)


def test_a_forward_that_fails_is_the_error_of_its_request_alone(llama):
    torch.manual_seed(0)
    driven, into = BatchedEngine(Failing(LlamaConfig(**SIZES)), Limits(CONTEXT, frozenset())), ({}, {})
    good = [token for token in prompt(5) if token != 96]
    driven.submit(Request("good", good, greedy(8)))
    driven.submit(Request("prompt", [5, 96, 7], greedy(8)))
    collect(driven.step(), into)
    driven.submit(Request("token", prompt(6), greedy(8)))
    collect(driven.step(), into)
    row = next(row for row in driven._scheduler.running if row.request.id == "token")
    row.tokens[-1] = 96  # as if it had been drawn
    tokens, last = drain(driven, into)
    assert last["prompt"].error == last["token"].error == "RuntimeError: token 96"
    assert (tokens["good"], last["good"].finish_reason) == (reference(llama, good, 8), "length")
    assert driven.counters.finished == 3


def test_running_out_of_memory_is_the_error_of_the_request_that_needs_it(llama, monkeypatch):
    real = slots_module.zeros

    def scarce(shape, dtype, device):
        if shape[2] > 512:
            raise RuntimeError("can't allocate memory")
        return real(shape, dtype, device)

    monkeypatch.setattr(slots_module, "zeros", scarce)
    driven = engine("llama")
    driven.submit(Request("small", prompt(5), greedy(40)))
    driven.submit(Request("grows", prompt(490), greedy(40)))
    driven.submit(Request("large", prompt(550), greedy(40)))
    tokens, last = drain(driven)
    assert "can't allocate" in last["large"].error
    assert "can't allocate" in last["grows"].error
    assert tokens["grows"] == reference(llama, prompt(490), 40)[: len(tokens["grows"])]
    assert (tokens["small"], last["small"].finish_reason) == (reference(llama, prompt(5), 40), "length")


def test_a_broken_stops_at_and_a_broken_output_end_their_request_alone(llama):
    driven = engine("llama")
    driven.submit(Request("bad", prompt(5), greedy(8), lambda token: bool(1 // 0)))
    driven.submit(Request("good", prompt(6), greedy(8)))
    tokens, last = drain(driven)
    assert last["bad"].error.startswith("ZeroDivisionError")
    assert tokens["good"] == reference(llama, prompt(6), 8)
    broken = build("llama")
    driven = BatchedEngine(broken, Limits(CONTEXT, frozenset()))
    broken.lm_head.weight.data.fill_(float("nan"))
    driven.submit(Request("bad", prompt(5), greedy(8)))
    assert drain(driven)[1]["bad"].error == "the model's output is not a number"


def test_memory_beyond_the_room_is_given_back(llama):
    """A slot that was long and is short now: its pages go back, and what the others hold stays."""
    bytes_each = slots_module.position_bytes(llama.config, torch.float32)
    driven = engine("llama", kv_bytes=640 * bytes_each)
    cache = driven._forward.cache
    for number in range(6):
        driven.submit(Request(str(number), prompt(550 - number), greedy(5)))
        tokens, _ = drain(driven)
        assert tokens[str(number)] == reference(llama, prompt(550 - number), 5)
        assert cache.touched <= 640
    short = prompt(20)
    assert answer(driven, short, greedy(30))[0] == reference(llama, short, 30)


def test_keys_and_values_can_be_kept_in_half_the_memory(llama):
    model = build("llama")
    driven = BatchedEngine(model, Limits(CONTEXT, frozenset()), kv_dtype=torch.float16)
    found = answer(driven, prompt(40), greedy(6))[0]
    assert {layer.keys.dtype for layer in driven._forward.cache.layers} == {torch.float16}
    assert found == reference(llama, prompt(40), 6)
    assert driven._scheduler.capacity == 2 * engine("llama")._scheduler.capacity


def test_smollm2_knows_the_capital_of_france(smollm2_home):
    model, limits = load(smollm2_home, dtype="float32")
    assert limits == read_limits(smollm2_home)
    tokenizer = tokenizer_of(smollm2_home)
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(question).ids
    wanted = reference(model, ids, 30)
    assert tokenizer.decode(wanted, skip_special_tokens=True) == "The capital of France is Paris."
    driven, into = BatchedEngine(model, limits), ({}, {})
    driven.submit(Request("a", ids, greedy(30)))
    collect(driven.step(), into)
    driven.submit(Request("b", ids, greedy(30)))
    tokens, last = drain(driven, into)
    assert tokens == {"a": wanted, "b": wanted}
    assert {output.finish_reason for output in last.values()} == {"stop"}


def test_gemma3_answers_as_generate_does(gemma3_home):
    model, limits = load(gemma3_home, dtype="float32")
    ids = tokenizer_of(gemma3_home).encode("The capital of France is").ids
    wanted = reference(model, ids, 6)
    assert answer(BatchedEngine(model, limits), ids, greedy(6))[0] == wanted


MANY_WAYS = [
    {},
    {"top_p": 0.9},
    {"top_k": 7, "temperature": 1.7},
    {"min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"presence_penalty": 1.0, "logit_bias": ((5, 3.0), (9, -100.0))},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0},
]


def test_a_seed_gives_the_same_tokens_alone_and_among_32():
    asked = [Sampling(max_tokens=12, seed=n, **MANY_WAYS[n % len(MANY_WAYS)]) for n in range(32)]
    requests = [Request(str(n), prompt(3 + n, n), sampling) for n, sampling in enumerate(asked)]
    together = engine("llama", max_running=32)
    for request in requests:
        together.submit(request)
    tokens, _ = drain(together)
    for request in requests:
        assert answer(engine("llama"), request.input_ids, request.sampling)[0] == tokens[request.id]


def test_logprobs_are_those_of_a_plain_forward(llama):
    driven, found = engine("llama"), []
    driven.submit(Request("a", prompt(9), Sampling(max_tokens=8, seed=3, logprobs=True, top_logprobs=4, top_p=0.5)))
    while driven.busy:
        for output in driven.step():
            assert [logprob.token_id for logprob in output.logprobs] == output.token_ids
            found += output.logprobs
    ids = [*prompt(9), *(logprob.token_id for logprob in found)]
    with torch.inference_mode():
        wanted = torch.log_softmax(llama(torch.tensor([ids])).logits[0, 8:-1].double(), -1)
    for row, logprob in zip(wanted, found, strict=True):
        assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-3)
        values, tokens = row.topk(4)
        assert [token for token, _ in logprob.top] == tokens.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_min_tokens_and_ignore_eos_go_on_past_an_end(llama):
    plain = reference(llama, prompt(9), 12)
    end = plain[3]
    first = plain.index(end)
    assert answer(engine("llama", eos=(end,)), prompt(9), greedy(12)) == (plain[: first + 1], "stop")
    assert answer(engine("llama", eos=(end,)), prompt(9), greedy(12, ignore_eos=True)) == (plain, "length")
    tokens, _ = answer(engine("llama", eos=(end,)), prompt(9), greedy(12, min_tokens=first + 1))
    assert end not in tokens[: first + 1]


def test_on_the_kernels_a_request_has_the_same_bits_whatever_runs_beside_it(smollm2_home, monkeypatch):
    """Alone, from a kept beginning, in chunks beside others that decode, at temperature 1: the very same logits."""
    if native.load() is None:
        pytest.skip("the kernels are not built on this machine: it has no compiler, or no AVX2")
    model, limits = load(smollm2_home)
    real, seen = batched.sample, {}

    def listening(logits, draws):
        for draw, row in zip(draws, logits, strict=True):
            seen.setdefault(draw.sampling.seed, []).append(row.clone())
        return real(logits, draws)

    monkeypatch.setattr(batched, "sample", listening)
    long = [100 + 37 * place % 5000 for place in range(300)]
    found = {}
    for name in ("alone", "again", "among others"):
        if name != "again":
            driven = BatchedEngine(model, limits)
        for number in range(5 if name == "among others" else 0):
            ids = [50 + number + 13 * place % 3000 for place in range(20 + number)]
            driven.submit(Request(str(number), ids, Sampling(max_tokens=30, seed=number)))
        driven.step()
        driven.submit(Request("it", long, Sampling(max_tokens=8, seed=99)))
        tokens, _ = drain(driven)
        found[name] = tokens["it"], torch.stack(seen.pop(99))
    for name in ("again", "among others"):
        assert found[name][0] == found["alone"][0]
        assert torch.equal(found[name][1], found["alone"][1])
    assert driven.counters.steps > 300 // BESIDE
