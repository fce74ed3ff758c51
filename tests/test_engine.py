"""The transformers engine: it must answer as `model.generate` does, whatever runs beside, and survive what fails."""

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipelines.engine import Limits, Request
from pipelines.engine import slots as slots_module
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.limits import read_limits
from pipelines.engine.slots import Unsupported
from pipelines.engine.weights import WeightsError, load
from pipelines.sampling import Sampling

CONTEXT = 600
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,  # else every logit is nearly the same
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = SIZES | {"sliding_window": 6, "layer_types": MIXED, "tie_word_embeddings": False}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from more, and lose much where cores are busy: threads spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gemma3", "mistral"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def prompt(length, seed=0):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


def greedy(max_tokens, **fields):
    return Sampling(max_tokens=max_tokens, temperature=0, **fields)


def engine(model, *, eos=(), context=CONTEXT, **options):
    return BatchedEngine(model, Limits(context, frozenset(eos)), **options)


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


def reference(model, input_ids, count):
    found = model.generate(torch.tensor([input_ids]), do_sample=False, max_new_tokens=count, pad_token_id=0)
    return found[0, len(input_ids) :].tolist()


def test_alone_it_answers_as_generate_does(model):
    driven = engine(model)
    for length in (1, 5, 20, 290):  # shorter and longer than the window of 6; the last crosses a growth at 512
        wanted = reference(model, prompt(length), 24)
        assert len(set(wanted)) > 5, "a model that repeats itself shows nothing"
        assert answer(driven, prompt(length), greedy(24)) == (wanted, "length")


def test_with_others_that_come_and_go_it_answers_as_generate_does(model):
    """Arrivals at different steps, different lengths, two cancels, a queue: slots are moved and grown under way."""
    driven, into = engine(model, max_running=4), ({}, {})
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


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(model):
    samplings = {
        str(seed): Sampling(max_tokens=20, temperature=0.3 * seed, top_p=1 - 0.1 * seed, seed=seed)
        for seed in range(1, 6)
    }
    alone = {name: answer(engine(model), prompt(8), sampling)[0] for name, sampling in samplings.items()}
    driven = engine(model)
    for name, sampling in samplings.items():
        driven.submit(Request(name, prompt(8), sampling))
        driven.step()
    assert drain(driven)[1].keys() == alone.keys()
    into = ({}, {})
    for name, sampling in samplings.items():
        driven.submit(Request(name, prompt(8), sampling))
        collect(driven.step(), into)
    assert drain(driven, into)[0] == alone
    assert len({tuple(ids) for ids in alone.values()}) > 1


def test_a_request_without_a_seed_gets_one(llama):
    assert len(answer(engine(llama), prompt(4), Sampling(max_tokens=5))[0]) == 5


def test_an_end_token_stops_and_is_part_of_the_answer(llama):
    wanted = reference(llama, prompt(7), 30)
    end = wanted[5]
    cut = wanted[: wanted.index(end) + 1]
    assert answer(engine(llama, eos=[end]), prompt(7), greedy(30)) == (cut, "stop")


def test_a_stop_string_stops_with_the_token_that_completes_it(llama):
    wanted, seen = reference(llama, prompt(7), 30), []

    def stops_at(token_id):
        seen.append(token_id)
        return len(seen) == 4

    assert answer(engine(llama), prompt(7), greedy(30), stops_at) == (wanted[:4], "stop")
    assert seen == wanted[:4]


def test_the_context_bounds_prompt_and_answer_together(llama):
    wanted = reference(llama, prompt(7), 9)
    assert answer(engine(llama, context=16), prompt(7), Sampling(temperature=0)) == (wanted, "length")
    assert answer(engine(llama, context=16), prompt(7), greedy(100)) == (wanted, "length")
    assert answer(engine(llama, context=16), prompt(15), greedy(100))[1] == "length"


@pytest.mark.parametrize("length", [0, 16, 17])
def test_a_prompt_that_does_not_fit_is_its_own_error(llama, length):
    driven = engine(llama, context=16)
    driven.submit(Request("bad", prompt(length), greedy(3)))
    driven.submit(Request("good", prompt(4), greedy(3)))
    tokens, last = drain(driven)
    assert last["bad"].finish_reason == "error"
    assert "takes 1 to 15" in last["bad"].error
    assert tokens["good"] == reference(llama, prompt(4), 3)
    assert (driven.counters.finished, driven.counters.prompt_tokens) == (2, 4)


def test_rows_are_bounded_and_the_others_wait_in_order(llama):
    driven = engine(llama, max_running=2)
    for name in "abc":
        driven.submit(Request(name, prompt(3), greedy(2)))
    assert [output.id for output in driven.step()] == ["a", "b"]
    assert (driven.counters.running, driven.counters.waiting) == (2, 1)
    assert [output.id for output in driven.step()] == ["a", "b"]
    assert [output.id for output in driven.step()] == ["c"]


def test_long_prompts_come_in_one_a_step(llama):
    driven = engine(llama)
    for name in "abc":
        driven.submit(Request(name, prompt(300), greedy(3)))
    assert [output.id for output in driven.step()] == ["a"]
    assert [output.id for output in driven.step()] == ["a", "b"]


def test_cancel_waiting_running_and_unknown(llama):
    driven = engine(llama, max_running=1)
    for name in "ab":
        driven.submit(Request(name, prompt(3), greedy(50)))
    driven.step()
    for name in ("a", "b", "nobody"):
        driven.cancel(name)
    assert [(output.id, output.finish_reason) for output in driven.step()] == [
        ("a", "cancelled"),
        ("b", "cancelled"),
    ]
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


def test_a_forward_that_fails_is_the_error_of_its_request_alone():
    torch.manual_seed(0)
    model = Failing(LlamaConfig(**SIZES)).eval()
    driven = engine(model)
    good = [token for token in prompt(5) if token != 96]
    driven.submit(Request("good", good, greedy(8)))
    driven.submit(Request("prompt", [5, 96, 7], greedy(8)))
    driven.step()
    driven.submit(Request("token", prompt(6), greedy(8), lambda token: False))
    driven.step()
    row = next(row for row in driven._running if row.request.id == "token")
    row.last_token = 96  # as if it had been drawn
    _, last = drain(driven)
    assert last["token"].error == "RuntimeError: token 96"
    assert last["good"].finish_reason == "length"
    assert driven.counters.finished == 3


def test_running_out_of_memory_is_the_error_of_the_request_that_needs_it(llama, monkeypatch):
    real = slots_module._zeros

    def scarce(shape, like):
        if shape[2] > 512:
            raise RuntimeError("can't allocate memory")
        return real(shape, like)

    monkeypatch.setattr(slots_module, "_zeros", scarce)
    driven = engine(llama)
    driven.submit(Request("small", prompt(5), greedy(40)))
    driven.submit(Request("grows", prompt(490), greedy(40)))
    driven.submit(Request("large", prompt(550), greedy(40)))
    tokens, last = drain(driven)
    assert "can't allocate" in last["large"].error
    assert "can't allocate" in last["grows"].error
    assert tokens["grows"] == reference(llama, prompt(490), 40)[: len(tokens["grows"])]
    assert (tokens["small"], last["small"].finish_reason) == (reference(llama, prompt(5), 40), "length")


def test_a_broken_stops_at_and_a_broken_output_end_their_request_alone(llama):
    driven = engine(llama)
    driven.submit(Request("bad", prompt(5), greedy(8), lambda token: bool(1 // 0)))
    driven.submit(Request("good", prompt(6), greedy(8)))
    tokens, last = drain(driven)
    assert last["bad"].error.startswith("ZeroDivisionError")
    assert tokens["good"] == reference(llama, prompt(6), 8)
    broken = build("llama")
    driven = engine(broken)
    broken.lm_head.weight.data.fill_(float("nan"))
    driven.submit(Request("bad", prompt(5), greedy(8)))
    assert drain(driven)[1]["bad"].error == "the model's output is not a number"


def test_memory_is_given_back_when_nothing_runs(llama):
    driven = engine(llama)
    answer(driven, prompt(300), greedy(2))
    assert not any(layer.is_initialized for layer in driven._slots.layers)


def test_a_model_that_slots_cannot_cache_is_refused_at_load():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(Unsupported, match="mamba"):
        engine(MambaForCausalLM(MambaConfig(**sizes)))


def test_a_model_that_answers_differently_as_a_batch_is_refused_at_load(monkeypatch):
    class Shifted(LlamaForCausalLM):
        def forward(self, position_ids=None, **rest):
            return super().forward(position_ids=position_ids * 2 if position_ids is not None else None, **rest)

    torch.manual_seed(0)
    with pytest.raises(Unsupported, match="off by"):
        engine(Shifted(LlamaConfig(**SIZES)))


STORED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(model, name, file, kind=gguf.GGMLQuantizationType.F32):
    """As llama.cpp's convert_hf_to_gguf.py writes it: q and k of a Llama permuted, a Gemma's norms with 1 added."""
    writer = gguf.GGUFWriter(file, name)
    writer.add_token_list([f"token {number}" for number in range(97)])
    stored = STORED | (GEMMA_NORMS if name == "gemma3" else NORMS)
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        outer = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
        outer["model.norm.weight"] = "output_norm.weight"
        if full in outer:
            place = outer[full]
        else:
            _, _, layer, rest = full.split(".", 3)
            stem, _, suffix = rest.rpartition(".")
            place = f"blk.{layer}.{stored[stem]}.{suffix}"
        if name == "llama" and ("q_proj" in full or "k_proj" in full):
            heads = 4 if "q_proj" in full else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if name == "gemma3" and full.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(place, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_model_it_was_made_from(name, tmp_path):
    model = build(name)
    model.config.save_pretrained(tmp_path)
    write_gguf(model, name, tmp_path / "model.gguf")
    loaded, limits = load(tmp_path, dtype="float32")
    assert limits == Limits(CONTEXT, frozenset())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], msg=key)
    ids = torch.tensor([prompt(20)])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_quantised_gguf_file_is_near_the_model_it_was_made_from(tmp_path, llama):
    llama.config.save_pretrained(tmp_path)
    write_gguf(llama, "llama", tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    loaded, _ = load(tmp_path, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor.float(), llama.state_dict()[key], atol=0.03, rtol=0.02, msg=key)


def test_safetensors_load_too(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.dtype == torch.float32
    assert answer(engine(loaded), prompt(5), greedy(5))[0] == reference(llama, prompt(5), 5)


def test_weights_that_do_not_fit_are_an_error_that_says_so(tmp_path, llama):
    llama.config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="neither"):
        load(tmp_path)
    write_gguf(llama, "llama", tmp_path / "a.gguf")
    LlamaConfig(**SIZES | {"num_hidden_layers": 4}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"lacks 9 tensors"):
        load(tmp_path)
    LlamaConfig(**SIZES | {"num_hidden_layers": 2}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"has 9 tensors too many"):
        load(tmp_path)
    LlamaConfig(**SIZES | {"intermediate_size": 96}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"is \(64, 32\), not \(96, 32\)"):
        load(tmp_path)
    write_gguf(llama, "falcon", tmp_path / "a.gguf")
    with pytest.raises(WeightsError, match="safetensors"):
        load(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGML")
    with pytest.raises(WeightsError, match="several"):
        load(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGML" + bytes(100))
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(ValueError, match="not a GGUF file"):
        load(tmp_path)


def test_smollm2_knows_the_capital_of_france(smollm2_home):
    model, limits = load(smollm2_home, dtype="float32")
    assert limits == read_limits(smollm2_home)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_home)
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(question)["input_ids"]
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
    ids = AutoTokenizer.from_pretrained(gemma3_home)("The capital of France is")["input_ids"]
    assert answer(BatchedEngine(model, limits), ids, greedy(6))[0] == reference(model, ids, 6)


MIXED = [
    {},
    {"top_p": 0.9},
    {"top_k": 7, "temperature": 1.7},
    {"min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"presence_penalty": 1.0, "logit_bias": ((5, 3.0), (9, -100.0))},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0},
]


def test_a_seed_gives_the_same_tokens_alone_and_among_32(llama):
    requests = [
        Request(str(n), prompt(3 + n, n), Sampling(max_tokens=12, seed=n, **MIXED[n % len(MIXED)])) for n in range(32)
    ]
    together = engine(llama, max_running=32)
    for request in requests:
        together.submit(request)
    tokens, _ = drain(together)
    for request in requests:
        assert answer(engine(llama), request.input_ids, request.sampling)[0] == tokens[request.id]


def test_logprobs_are_those_of_a_plain_forward(llama):
    driven, found = engine(llama), []
    driven.submit(Request("a", prompt(9), Sampling(max_tokens=8, seed=3, logprobs=True, top_logprobs=4, top_p=0.5)))
    while driven.busy:
        for output in driven.step():
            assert [logprob.token_id for logprob in output.logprobs] == output.token_ids
            found += output.logprobs
    ids = prompt(9) + [logprob.token_id for logprob in found]
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
    assert answer(engine(llama, eos=(end,)), prompt(9), greedy(12)) == (plain[: first + 1], "stop")
    assert answer(engine(llama, eos=(end,)), prompt(9), greedy(12, ignore_eos=True)) == (plain, "length")
    tokens, _ = answer(engine(llama, eos=(end,)), prompt(9), greedy(12, min_tokens=first + 1))
    assert end not in tokens[: first + 1]
