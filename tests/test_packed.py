"""Packed linear layers: they must compute what the blocks say, whatever is computed beside it."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from pipelines.engine import Request, native, swap
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.codes import GROUP, codes
from pipelines.engine.packed import PackedLinear, fast_here, halves, packable
from pipelines.engine.weights import load
from tests.driving import answer, collect, drain, engine, greedy, tokenizer_of
from tests.gguf_file import write_gguf
from tests.models import MODELS, prompt
from tests.test_codes import KINDS, blocks, numbers

ROWS, COLUMNS = 80, 512  # more than a whole block of the kernel's 64 rows

pytestmark = pytest.mark.skipif(not fast_here(), reason="GGUF is packed on CPUs with AVX-512 only")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_native_kernels(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)


def exact(kind, rows):
    return torch.from_numpy(dequantize(rows, kind))


def group_error(found, wanted):
    """The largest difference, in parts of the largest weight of its group."""
    groups = (ROWS, -1, GROUP)
    off, largest = (found.float() - wanted).reshape(groups).abs(), wanted.reshape(groups).abs()
    return float((off.amax(-1) / largest.amax(-1)).max())


def inputs(count, seed=0):
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


def test_halves_add_up(kind):
    found = codes(kind, blocks(kind))
    parts = halves(found)
    assert all(part.values.min() >= -8 and part.values.max() <= 7 for part in parts)
    np.testing.assert_allclose(sum(numbers(part) for part in parts), numbers(found), atol=1e-5)


def test_a_weight_is_off_by_no_more_than_bfloat16_rounds(kind):
    rows = blocks(kind)
    layer = PackedLinear(codes(kind, rows))
    columns = torch.eye(COLUMNS).bfloat16().split(layer.many - 1)
    kernels = torch.cat([layer(part) for part in columns]).t()  # a product with 1 is the weight
    assert group_error(kernels, exact(kind, rows)) < 3 * 2**-8  # the products of two halves are rounded, and their sum
    assert group_error(layer.dequantised(), exact(kind, rows)) < 2**-7


@pytest.mark.parametrize("count", [1, 5, 50])
def test_it_is_a_linear_layer(kind, count):
    rows, bias = blocks(kind), torch.randn(ROWS).bfloat16()
    layer = PackedLinear(codes(kind, rows), bias=bias)
    assert not list(layer.parameters())
    wanted = torch.nn.functional.linear(inputs(count).float(), exact(kind, rows), bias.float())
    found = layer(inputs(count)[None])
    assert found.shape == (1, count, ROWS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].float(), wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))


@pytest.mark.parametrize("count", [2, 16, 50])
def test_a_row_depends_on_no_other(kind, count):
    layer = PackedLinear(codes(kind, blocks(kind)))
    beside, row = inputs(count, seed=1), inputs(1)
    beside[0] = row
    loud = beside.clone()
    loud[1:] *= 1000
    together = layer(beside)[0]
    assert torch.equal(together, layer(loud)[0])
    alone = layer(row)[0]
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.01 * float(alone.abs().max()))


def test_a_tied_weight_serves_many_inputs():
    rows = blocks(Kind.Q8_0)
    tied = torch.nn.Parameter(exact(Kind.Q8_0, rows).bfloat16(), requires_grad=False)
    layer = PackedLinear(codes(Kind.Q8_0, rows), tied=tied)
    assert torch.equal(layer(inputs(50)), torch.nn.functional.linear(inputs(50), tied))
    wanted = inputs(1).float() @ tied.float().t()
    torch.testing.assert_close(layer(inputs(1)).float(), wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))


def test_what_cannot_be_packed():
    assert packable(64)
    assert not packable(97)


def save(name, folder, kind, **sizes):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    config = type(model.config)(**model.config.to_dict() | sizes)
    model = type(model)(config).eval()
    config.save_pretrained(folder)
    write_gguf(model, name, folder / "model.gguf", kind)


def packed_in(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_a_packed_model_is_the_dequantised_one(name, kind, tmp_path):
    save(name, tmp_path, kind, vocab_size=112, initializer_range=0.2)
    packed, _ = load(tmp_path)
    plain, _ = load(tmp_path, dtype="float32")
    assert len(packed_in(packed)) == 3 * 7 + 1
    assert not packed_in(plain)
    assert_near(packed, plain, prompt(20))
    assert len(answer(engine(packed), prompt(5), greedy(5))[0]) == 5


def test_only_auto_on_a_cpu_with_the_kernel_packs(tmp_path, monkeypatch):
    save("llama", tmp_path, Kind.Q8_0)
    packed, _ = load(tmp_path)
    assert "lm_head" not in packed_in(packed)  # 97 rows
    assert packed.dtype == torch.bfloat16
    assert not packed_in(load(tmp_path, dtype="bfloat16")[0])
    monkeypatch.setattr(swap, "fast_here", lambda: False)
    model, _ = load(tmp_path)
    assert not packed_in(model)
    assert model.dtype == torch.float32


def test_a_file_with_nothing_to_pack_is_float32(tmp_path):
    save("llama", tmp_path, Kind.F32)
    model, _ = load(tmp_path)
    assert not packed_in(model)
    assert model.dtype == torch.float32


QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_smollm2_packed_knows_the_capital_of_france(smollm2_home):
    model, limits = load(smollm2_home)
    assert len(packed_in(model)) == 30 * 7 + 1
    tokenizer = tokenizer_of(smollm2_home)
    ids = tokenizer.encode(QUESTION).ids
    driven, into = BatchedEngine(model, limits), ({}, {})
    driven.submit(Request("a", ids, greedy(30)))
    collect(driven.step(), into)
    for name in "bcdefg":
        driven.submit(Request(name, ids, greedy(30)))
    tokens, last = drain(driven, into)
    assert {tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens.values()} == {
        "The capital of France is Paris."
    }
    assert {output.finish_reason for output in last.values()} == {"stop"}
    plain, _ = load(smollm2_home, dtype="bfloat16")
    model.set_attn_implementation("sdpa")  # the engine's is over its slots
    assert_near(model, plain, ids)


def test_gemma3_packed_is_near_the_dequantised_one(gemma3_home):
    """Q5_0, Q8_0 and Q4_K packed, Q6_K not."""
    packed, _ = load(gemma3_home)
    assert len(packed_in(packed)) == 18 * 7 + 1 - 9
    plain, _ = load(gemma3_home, dtype="bfloat16")
    assert_near(packed, plain, tokenizer_of(gemma3_home).encode("The capital of France is").ids)


@torch.inference_mode()
def assert_near(packed, plain, ids):
    """By few inputs and by many, the last logits are as near as two ways of rounding are: measured 0.01 to 0.03."""
    for count in (len(ids), 60):
        asked = torch.tensor([(ids * 12)[:count]])
        found, wanted = (model(asked, logits_to_keep=4).logits.float() for model in (packed, plain))
        assert float((found - wanted).norm() / wanted.norm()) < 0.06
