"""The native kernels: what they compute against float64, the same bits whatever is beside, and going without them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipelines.engine import native, swap
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.codes import GROUP, Codes, codes, quantised
from pipelines.engine.native import NoKernels
from pipelines.engine.native_attention import attend
from pipelines.engine.native_layers import Joined, NativeEmbedding, NativeLinear, NativeWeight
from pipelines.engine.weights import WeightsError, load
from tests.driving import answer, engine, greedy, tokenizer_of
from tests.gguf_file import write_gguf
from tests.models import MODELS, prompt
from tests.test_codes import KINDS, blocks, numbers

ROWS, COLUMNS = 80, 512
COUNTS = (1, 2, 3, 5, 16, 33, 100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels():
    try:
        return native.Kernels(native.build())
    except NoKernels as error:
        pytest.skip(f"no native kernels: {error}")


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(count, columns=COLUMNS, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def product(x, weight):
    return x.double() @ torch.from_numpy(weight).double().t()


def steps(x):
    """How far the kernels may round each input: 16 bits, with a scale for every 32."""
    return (x.double().unflatten(-1, (-1, GROUP)).abs().amax(-1) / 32767 / 2).repeat_interleave(GROUP, -1)


def assert_close(found, wanted, within):
    assert float((found.double() - wanted).norm() / wanted.norm()) < within


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_a_linear_layer_of_what_gguf_dequantises(kernels, kind):
    rows = blocks(kind)
    layer = NativeLinear(kernels, NativeWeight(codes(kind, rows)))
    for count in COUNTS:
        found = layer(inputs(count)[None])
        assert found.shape == (1, count, ROWS)
        # Measured 2e-5, and 2e-4 where the base is no float16 and is rounded to one.
        within = 5e-4 if kind in (Kind.Q4_1, Kind.Q4_K) else 5e-5
        assert_close(found[0], product(inputs(count), dequantize(rows, kind)), within)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.floats(1e-6, 1e3),
)
def test_any_shape_and_size_of_weights(kernels, bits, rows, groups, count, seed, size):
    weight = np.random.default_rng(seed).normal(0, size, (rows, groups * GROUP)).astype(np.float32)
    made = as_float16(quantised(weight, bits))
    layer, x, bias = NativeWeight(made), inputs(count, groups * GROUP, seed), torch.randn(rows) * size
    found = NativeLinear(kernels, layer, bias=bias)(x)
    wanted = product(x, numbers(made)) + bias
    # The inputs' rounding, and that of a sum in float32, of terms that may cancel out.
    within = product(steps(x) + 1e-5 * x.abs(), np.abs(numbers(made))) + 1e-5 * bias.abs()
    assert bool(((found - wanted).abs() <= within).all())
    assert torch.equal(NativeLinear(kernels, layer, bias=bias)(x[-1:])[0], found[-1])


def as_float16(made):
    """With scales and bases that have no more digits than float16: then the kernels round no weight."""

    def shorter(numbers):
        return (numbers.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    return made._replace(scale=shorter(made.scale), base=shorter(made.base))


@pytest.mark.parametrize(("bits", "extremes"), [(4, (-8, 7)), (8, (-128, 127))])
def test_the_largest_sums_of_integers_overflow_nothing(kernels, bits, extremes):
    ones, none = np.ones((ROWS, COLUMNS // GROUP), np.float32), np.zeros((ROWS, COLUMNS // GROUP), np.float32)
    for value in extremes:
        weight = NativeWeight(Codes(bits, np.full((*ones.shape, GROUP), value, np.int8), ones, none))
        for sign in (1, -1):
            found = NativeLinear(kernels, weight)(torch.full((3, COLUMNS), float(sign)))
            torch.testing.assert_close(found, torch.full((3, ROWS), float(sign * value * COLUMNS)), rtol=1e-6, atol=0)


def test_a_row_has_the_same_bits_alone_and_beside_others(kernels):
    for kind in KINDS:
        layer = NativeLinear(kernels, NativeWeight(codes(kind, blocks(kind))))
        x = inputs(100)
        whole = layer(x)
        for count in COUNTS:
            for first in (0, 100 - count):
                assert torch.equal(layer(x[first : first + count]), whole[first : first + count])
        loud = x.clone()
        loud[1:] *= 1000
        assert torch.equal(layer(loud)[0], whole[0])
        for threads in (1, 4, 16, 2):
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), whole)


def test_a_few_large_inputs_cost_the_others_no_digits(kernels):
    """Each of these, rounded in one scale with the others of its group, would make them zeros."""
    layer = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_0, blocks(Kind.Q4_0))))
    weight = torch.from_numpy(dequantize(blocks(Kind.Q4_0), Kind.Q4_0)).double()
    x = inputs(8)
    for row, places in enumerate([[0], [31], [32, 33], [5, 100], [7, 8], [511], list(range(0, 512, 64)), [250]]):
        x[row, places] *= 300
    small = x.abs() < 30
    left = layer(x) - (x * ~small).double() @ weight.t()  # what the others add
    assert_close(left, (x * small).double() @ weight.t(), 0.2)
    whole = layer(x)
    assert_close(whole, x.double() @ weight.t(), 0.004)
    assert all(torch.equal(layer(x[row : row + 1])[0], whole[row]) for row in range(8))


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1e25])
def test_inputs_of_any_size(kernels, size):
    layer = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_0, blocks(Kind.Q4_0))))
    x = inputs(3)
    x[0, 5], x[1, :32] = 1e4, 0
    found = layer(x * size)
    assert found.isfinite().all()
    if size > 1e-30:
        assert_close(found / size, product(x, dequantize(blocks(Kind.Q4_0), Kind.Q4_0)), 1e-4)


def test_inputs_of_other_strides_and_of_none(kernels):
    layer = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_0, blocks(Kind.Q4_0))))
    x = inputs(6)
    assert torch.equal(layer(x[::2]), layer(x[::2].contiguous()))
    assert torch.equal(layer(x.t().contiguous().t()), layer(x))
    assert layer(x[:0]).shape == (0, ROWS)
    with pytest.raises(TypeError, match=r"float32 \[..., 512\] on the CPU is wanted, not torch.bfloat16"):
        layer(x.bfloat16())


def test_zeros_are_zeros_and_what_is_no_number_stays_none(kernels):
    layer = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_1, blocks(Kind.Q4_1))))
    assert torch.equal(layer(torch.zeros(1, COLUMNS)), torch.zeros(1, ROWS))
    for broken in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 17, COLUMNS - 1):
            x = inputs(3)
            x[1, place] = broken
            found = layer(x)
            assert not found[1].isfinite().any()
            assert torch.equal(found[[0, 2]], layer(inputs(3))[[0, 2]])


def test_the_embedding_is_the_weight_s_rows(kernels):
    for kind in KINDS:
        rows = blocks(kind)
        embedding = NativeEmbedding(kernels, NativeWeight(codes(kind, rows)), factor=2.0)
        ids = torch.tensor([[0, 79, 17], [16, 15, 17]])
        wanted = torch.from_numpy(dequantize(rows, kind))[ids] * 2
        # Exact but for a base that is no float16: off by 2^-11 of itself.
        largest = wanted.unflatten(-1, (-1, GROUP)).abs().amax(-1).repeat_interleave(GROUP, -1)
        assert bool(((embedding(ids) - wanted).abs() <= 2**-10 * largest).all())
        assert embedding(ids[:, :0]).shape == (2, 0, COLUMNS)
        for bad in (-1, ROWS):
            with pytest.raises(IndexError, match="from 0 to 79"):
                embedding(torch.tensor([bad]))


def test_layers_that_are_computed_as_one(kernels):
    whole = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_1, blocks(Kind.Q4_1))))
    first, second, third = Joined(whole, [48, 16, 16]).parts
    x, other = inputs(4), inputs(4, seed=1)
    wanted, others = whole(x).split([48, 16, 16], -1), whole(other).split([48, 16, 16], -1)
    assert torch.equal(first(x), wanted[0])
    assert torch.equal(second(x), wanted[1])
    assert torch.equal(second(x), wanted[1])  # again: computed again
    assert torch.equal(third(other), others[2])
    assert torch.equal(first(other), others[0])
    x_again = x.clone()
    assert torch.equal(third(x_again), wanted[2])


def attended(q, keys, values, slots, positions, *, window, scale, softcap):
    found = []
    for query, slot, position in zip(q.double(), slots.tolist(), positions.tolist(), strict=True):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        group = len(query) // keys.shape[1]
        k, v = (cache[slot, :, seen].double().repeat_interleave(group, 0) for cache in (keys, values))
        scores = torch.einsum("hd,hpd->hp", query, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        found.append(torch.einsum("hp,hpd->hd", scores.softmax(-1), v))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 256), (3, 3, 80), (10, 2, 8), (2, 2, 100)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (5, 2.0), (0, 30.0)])
def test_attend(kernels, dtype, heads, kv_heads, dim, window, softcap):
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, kv_heads, 400, dim, generator=random).to(dtype) for _ in range(2))
    # Single tokens, a prompt across a chunk's border, a prompt's start, and one that follows in another slot.
    slots = torch.tensor([2, 3] + [0] * 20 + [1] * 3 + [2])
    positions = torch.tensor([0, 399, *range(118, 138), 0, 1, 2, 1])
    for slot, length in ((0, 138), (1, 3), (2, 2)):  # what no row sees must not matter
        keys[slot, :, length:], values[slot, :, length:] = torch.nan, torch.nan
    q = torch.randn(len(slots), heads, dim, generator=random)
    options = {"window": window, "softcap": softcap, "scale": 0.2}
    found = attend(kernels, q, keys, values, slots, positions, **options)
    wanted = attended(q, keys, values, slots, positions, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6)
    for row in range(len(slots)):
        only = slice(row, row + 1)
        alone = attend(kernels, q[only], keys, values, slots[only], positions[only], **options)
        assert torch.equal(alone[0], found[row])


def test_attention_to_scores_far_apart(kernels):
    keys = torch.zeros(1, 1, 300, 16)
    keys[0, 0, 200, 0], keys[0, 0, 10, 0] = 1000, -1000
    values = torch.randn(1, 1, 300, 16)
    slots, positions, q = torch.tensor([0]), torch.tensor([299]), torch.ones(1, 1, 16)
    assert torch.equal(attend(kernels, q, keys, values, slots, positions, scale=1.0)[0, 0], values[0, 0, 200])


def test_attention_refuses_what_it_would_misread(kernels):
    cache, q, at = torch.zeros(1, 1, 8, 16), torch.zeros(1, 2, 16), torch.tensor([0])
    with pytest.raises(TypeError, match=r"queries are torch\.bfloat16"):
        attend(kernels, q.bfloat16(), cache, cache, at, at, scale=1.0)
    with pytest.raises(ValueError, match="not alike"):
        attend(kernels, q, cache, cache[:, :, :4], at, at, scale=1.0)
    with pytest.raises(ValueError, match="1 of int64"):
        attend(kernels, q, cache, cache, at, at.int(), scale=1.0)


@pytest.mark.parametrize("width", [576, 80, 7])
def test_a_norm(kernels, width):
    for make, added in ((LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)):
        plain = make(width)
        torch.nn.init.normal_(plain.weight)
        norm = swap.Native(kernels)._norm(plain)
        assert norm is not None
        assert norm.added == added
        x = inputs(300, width).view(3, 100, width)
        torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(norm(x[1]), norm(x)[1])
        assert torch.equal(norm(x.transpose(0, 1)), norm(x).transpose(0, 1))


def test_a_norm_that_computes_something_else_is_kept(kernels):
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    assert swap.Native(kernels)._norm(OtherRMSNorm(64)) is None


@pytest.fixture
def work(kernels):
    """A product on several threads; true where it came out right."""
    layer = NativeLinear(kernels, NativeWeight(codes(Kind.Q4_1, blocks(Kind.Q4_1))))
    x = inputs(100)
    wanted = layer(x)
    return lambda: torch.equal(layer(x), wanted)


def test_callers_at_the_same_time(work):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: all(work() for _ in range(300)), range(4)))


def test_its_threads_are_made_once(work):
    torch.set_num_threads(5)
    try:
        assert work()
        before = len(os.listdir("/proc/self/task"))
        assert all(work() for _ in range(500))
        assert len(os.listdir("/proc/self/task")) <= before
    finally:
        torch.set_num_threads(2)


def test_threads_that_slept_are_called(work):
    for pause in (0, 1e-5, 1e-4, 1e-3) * 50:
        time.sleep(pause)
        assert work()


def test_a_child_of_fork_has_threads_of_its_own(work):
    children = []
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(lambda: all(work() for _ in range(2000)))  # also where another thread is at work
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                before = len(os.listdir("/proc/self/task"))
                right = all(work() for _ in range(20))
                os._exit(0 if right and len(os.listdir("/proc/self/task")) > before else 1)
            children.append(child)
        assert going.result()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5


def test_a_process_with_sleeping_threads_ends():
    program = (
        "import torch; torch.set_num_threads(4)\n"
        "from tests.test_native import *\n"
        "found = native.Kernels(native.build())\n"
        "NativeLinear(found, NativeWeight(codes(Kind.Q4_1, blocks(Kind.Q4_1))))(inputs(100))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def save(name, folder, kind, **sizes):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    config = type(model.config)(**model.config.to_dict() | sizes)
    model = type(model)(config).eval()
    config.save_pretrained(folder)
    if kind is None:
        model.save_pretrained(folder)
    else:
        write_gguf(model, name, folder / "model.gguf", kind)


@pytest.fixture
def loaded_kernels(kernels, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: kernels)


def logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0, Kind.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.usefixtures("loaded_kernels")
def test_a_gguf_model_on_the_kernels_is_the_dequantised_one(name, kind, tmp_path):
    save(name, tmp_path, kind, initializer_range=0.2)
    model, _ = load(tmp_path)
    plain, _ = load(tmp_path, dtype="float32")
    assert model.dtype == torch.float32
    assert not swap.linears_of(model)
    assert type(model.get_input_embeddings()) is NativeEmbedding
    assert swap.linears_of(plain)
    ids = prompt(20)
    # Measured 0.0001, and of Q5_1 0.03: that becomes 8-bit codes, so that its weights are rounded.
    assert error(logits(model, ids), logits(plain, ids)) < (0.05 if kind is Kind.Q5_1 else 5e-4)
    assert len(answer(engine(model), prompt(5), greedy(5))[0]) == 5


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # with a head of its own, and with the embedding's
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("loaded_kernels")
def test_safetensors_are_quantised_when_asked(name, bits, tmp_path):
    save(name, tmp_path, None, initializer_range=0.2)
    plain, ids = load(tmp_path)[0], prompt(20)
    before, tied = logits(plain, ids), swap.is_tied(plain)
    with torch.no_grad():
        for linear in swap.linears_of(plain).values():
            of = 8 if tied and linear is plain.lm_head else bits
            linear.weight.copy_(torch.from_numpy(numbers(quantised(linear.weight.numpy(), of))))
    model, _ = load(tmp_path, quantize=f"int{bits}")
    assert not swap.linears_of(model)
    assert type(model.get_input_embeddings()) is (NativeEmbedding if tied else torch.nn.Embedding)
    # Measured 0.001, the rounding of scales to float16.
    assert error(logits(model, ids), logits(plain, ids)) < 0.003
    assert error(logits(model, ids), before) > 0


def test_what_cannot_be_quantised_says_so(tmp_path, monkeypatch):
    save("llama", tmp_path, None)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(swap, "fast_here", lambda: False)
    with pytest.raises(WeightsError, match="quantize = 'int8' needs a CPU"):
        load(tmp_path, quantize="int8")
    with pytest.raises(WeightsError, match="dtype = 'auto'"):
        load(tmp_path, quantize="int8", dtype="bfloat16")
    (tmp_path / "model.safetensors").unlink()
    save("llama", tmp_path, Kind.Q8_0)
    with pytest.raises(WeightsError, match=r"model\.gguf is quantised already: leave out quantize = 'int4'"):
        load(tmp_path, quantize="int4")


TEXTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is Paris."
    " It lies on the river Seine, in the north of the country, and more than two million people live there.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n"
    "class Tree:\n    def __init__(self, left, right):\n        self.left = left\n        self.right = right\n",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it"
    " was the epoch of belief, it was the epoch of incredulity, it was the season of Light.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "address": {"city": "London"}}',
]


@pytest.mark.usefixtures("loaded_kernels")
@pytest.mark.parametrize(("home", "within"), [("smollm2_home", 4e-4), ("gemma3_home", 0.01)])
def test_a_real_model_is_nearer_its_dequantised_one_than_bfloat16(home, within, request):
    """Measured in docs/engine-log.md. Some of Gemma's weights are Q6_K, rounded to 8-bit codes."""
    folder = request.getfixturevalue(home)
    tokenizer = tokenizer_of(folder)

    def found(**options):
        model = load(folder, **options)[0]
        assert options or not swap.linears_of(model)
        return torch.cat([logits(model, tokenizer.encode(text).ids) for text in TEXTS])

    plain, brief, own = found(dtype="float32"), found(dtype="bfloat16"), found()
    assert error(own, plain) < min(within, error(brief, plain))
    as_likely = [int((each.argmax(-1) == plain.argmax(-1)).sum()) for each in (own, brief)]
    assert as_likely[0] >= max(as_likely[1] - 1, 0.98 * len(plain))


def test_without_a_compiler_it_goes_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoKernels, match="no C\\+\\+ compiler 'no-such-compiler'"):
        native.build()
    native.load.cache_clear()
    try:
        assert native.load() is None
        assert native.load() is None
        assert [record.message for record in caplog.records if "no native kernels" in record.message] == [
            f"no native kernels: {native.place()} is not built (python -m pipelines.engine.native)"
        ]
        save("llama", tmp_path, Kind.Q8_0)
        model, _ = load(tmp_path)
        assert len(answer(engine(model), prompt(5), greedy(5))[0]) == 5
    finally:
        native.load.cache_clear()


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "sh -c 'echo source.cpp: error: no such register >&2; exit 1'")
    with pytest.raises(NoKernels, match="error: no such register"):
        native.build()
    assert not list((tmp_path / "kernels").iterdir())


def test_a_file_that_is_no_library_is_refused(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NoKernels, match=r"broken\.so"):
        native.Kernels(broken)


@pytest.mark.parametrize("options", ["-mno-avx512f", "-march=haswell"])
def test_with_fewer_instructions(kernels, tmp_path, monkeypatch, options):
    """AVX2, on whatever this machine has: the same products, which round nothing that differs."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_OPTIONS", (*native._OPTIONS, options))
    narrow = native.Kernels(native.build())
    assert not narrow.wide
    for kind in KINDS:
        weight = NativeWeight(codes(kind, blocks(kind)))
        assert torch.equal(NativeLinear(narrow, weight)(inputs(7)), NativeLinear(kernels, weight)(inputs(7)))


def test_without_avx2_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_OPTIONS", (*native._OPTIONS, "-march=x86-64"))
    with pytest.raises(NoKernels, match="this processor has no AVX2"):
        native.build()


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.usefixtures("loaded_kernels")
def test_smollm2_on_the_kernels_knows_the_capital_of_france(smollm2_home):
    """Of the first token float32's logits are 25.33 and 25.24: with inputs of 8 bits the answer began with an L."""
    model, limits = load(smollm2_home)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_home)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens, finished = answer(BatchedEngine(model, limits), ids, greedy(30))
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
    assert finished == "stop"
