"""Compiled steps: they answer as the model does, are compiled once, and whatever goes wrong the model runs without.

One package is compiled for all of these, by a real compiler, of a tiny model with 4-bit layers.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pipelines.engine import Limits, Request, native
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.compiled import Compiled
from pipelines.engine.compiled_ops import StepCache, step_caches
from pipelines.engine.compiled_skeleton import SMALL, dump, restore
from pipelines.engine.swap import Native
from pipelines.engine.tensors import tensors_of
from pipelines.engine.weights import _quantise
from pipelines.sampling import Sampling

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 6
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18, 19, 20]]
WAIT_S = 600  # of a machine with much else to do

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    native.build()
    native.load.cache_clear()
    return native.load()


def build(**config):
    """Layers with a window, and a tied head: what a step can get wrong."""
    torch.manual_seed(0)
    sizes = SIZES | {"sliding_window": WINDOW, "tie_word_embeddings": True} | config
    model = MistralForCausalLM(MistralConfig(**sizes)).eval()
    _quantise(model, Native(native.load()), 4)
    return model


@torch.inference_mode()
def plain(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def proof_of(model):
    return [(ids, plain(model, ids)[-1]) for ids in PROMPTS[:2]]


def wait(compiled):
    deadline = time.monotonic() + WAIT_S
    while compiled.poll() is None and compiled.state == "being compiled":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return compiled.poll()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def step(model, folder):
    compiled = Compiled(model, proof_of(model), folder)
    assert compiled.state == "being compiled"
    assert compiled.poll() is None  # nobody waits for it
    found = wait(compiled)
    assert found is not None, compiled.state
    return found


def run(step, layers, parts):
    """The logits after the last token of each part: (slot, first position, tokens)."""
    tokens = [(token, at, slot) for slot, first, ids in parts for at, token in enumerate(ids, first)]
    ends = torch.tensor([0] + [len(ids) for _, _, ids in parts]).cumsum(0)[1:] - 1
    ids, positions, slots = torch.tensor(tokens).T.contiguous()
    with torch.inference_mode():
        return step(ids[None], positions, slots, ends, layers)


def close(found, wanted):
    """But for rounding, which is coarse: inputs are rounded to 8 bits, and a last bit can decide which way."""
    return float((found - wanted).abs().max() / wanted.abs().max()) < 0.01


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_that_decode_get_what_the_model_gives(model, step, rows):
    layers = step_caches(model.config, slots=5, length=16)
    prompts = PROMPTS[:rows]
    run(step, layers, [(slot, 0, ids[:1]) for slot, ids in enumerate(prompts)])
    for at in range(1, max(map(len, prompts))):
        going = [(slot, ids) for slot, ids in enumerate(prompts) if at < len(ids)]
        found = run(step, layers, [(slot, at, ids[at : at + 1]) for slot, ids in going])
        assert found.shape == (len(going), SIZES["vocab_size"])
        assert found.dtype == torch.float32
        for row, (_, ids) in zip(found, going, strict=True):
            assert close(row, plain(model, ids)[at])


def test_a_row_has_the_same_logits_whatever_is_beside_it(model, step):
    layers = step_caches(model.config, slots=4, length=16)
    run(step, layers, [(slot, 0, ids[:-1]) for slot, ids in enumerate(PROMPTS)])
    last = [(slot, len(ids) - 1, ids[-1:]) for slot, ids in enumerate(PROMPTS)]
    together = run(step, layers, last)
    assert torch.equal(together, torch.cat([run(step, layers, [part]) for part in last]))


def test_parts_of_prompts_beside_rows_that_decode(model, step):
    layers = step_caches(model.config, slots=3, length=16)
    long, short = PROMPTS[0], PROMPTS[2]
    run(step, layers, [(2, 0, long[:3]), (0, 0, short[:2])])
    found = run(step, layers, [(0, 2, short[2:3]), (2, 3, long[3:])])
    assert close(found[0], plain(model, short)[2])
    assert close(found[1], plain(model, long)[-1])


def test_a_prompts_middle_has_no_logits(model, step):
    layers = step_caches(model.config, slots=1, length=16)
    ids, none = torch.tensor([PROMPTS[0]]), torch.zeros(0, dtype=torch.long)
    at = torch.arange(len(PROMPTS[0]))
    assert step(ids, at, torch.zeros_like(at), none, layers).shape == (0, SIZES["vocab_size"])
    found = run(step, layers, [(0, len(PROMPTS[0]), [5])])
    assert close(found[0], plain(model, [*PROMPTS[0], 5])[-1])


def test_only_its_own_positions_are_written(model, step):
    layers = step_caches(model.config, slots=3, length=8)
    for layer in layers:
        layer.keys.fill_(7)
        layer.values.fill_(7)
    run(step, layers, [(1, 2, [5, 6])])
    for layer in layers:
        for stored in layer:
            assert not (stored[1, :, 2:4] == 7).any()
            assert (stored[1, :, :2] == 7).all()
            assert (stored[1, :, 4:] == 7).all()
            assert (stored[[0, 2]] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_may_be_kept_in_half(model, step, dtype):
    layers = [
        StepCache(*(stored.to(dtype) for stored in layer)) for layer in step_caches(model.config, slots=1, length=16)
    ]
    exact = step_caches(model.config, slots=1, length=16)
    parts = [(0, 0, PROMPTS[0])]
    found, wanted = run(step, layers, parts), run(step, exact, parts)
    assert torch.equal(layers[0].keys, exact[0].keys.to(dtype))
    assert torch.equal(layers[0].values, exact[0].values.to(dtype))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.1
    assert not torch.equal(found, wanted)


def test_a_token_that_is_none_is_an_error(model, step):
    with pytest.raises(RuntimeError, match="compiled step failed"):
        run(step, step_caches(model.config, slots=1, length=8), [(0, 0, [97])])


def test_the_next_start_compiles_nothing_and_has_its_own_weights(folder, step):
    other = build()
    for layer in other.model.layers:
        layer.input_layernorm.weight.data.copy_(torch.linspace(0.5, 2, SIZES["hidden_size"]))
    compiled = Compiled(other, proof_of(other), folder)
    assert compiled.state == "compiled"
    found = run(compiled.poll(), step_caches(other.config, slots=1, length=16), [(0, 0, PROMPTS[0])])
    assert close(found[0], plain(other, PROMPTS[0])[-1])


@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"sliding_window": 7}, {"rms_norm_eps": 1e-5}])
def test_another_model_has_another_package(folder, step, monkeypatch, other):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = build(**other)
    compiled = Compiled(model, proof_of(model), folder)
    assert compiled.poll() is None
    assert "'no-such-compiler'" in compiled.state


def test_numbers_that_are_in_no_tensor_are_part_of_the_name(folder, step, model, monkeypatch):
    """A step has them in its code: with another model's it would answer wrongly."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    other = build()
    other.get_output_embeddings().native.gain *= 2
    assert Compiled(other, proof_of(model), folder).state != "compiled"


class Found:
    """A step that was compiled before: here for another model with the same weights."""

    def __init__(self, step):
        self.poll = lambda: step


@pytest.fixture
def engine(step, kernels):
    made = BatchedEngine(build(), Limits(64, frozenset()))
    made._forward._compiled = Found(step)
    yield made
    kernels.threads = 0  # an engine sets it, and it is part of a package's name


def answered(engine, name, ids, tokens=4):
    engine.submit(Request(name, ids, Sampling(temperature=0.9, seed=7, max_tokens=tokens, logprobs=True)))
    return [(out.token_ids, out.logprobs) for out in finished(engine)]


def finished(engine):
    outputs = []
    while engine.busy:
        outputs += engine.step()
    return outputs


def test_the_first_step_is_compiled_too_and_that_after_waking(engine):
    """Or a seed gives one answer when the pipeline has just been loaded or woken, and another later."""
    first = answered(engine, "a", PROMPTS[0])
    assert engine.counters.compiled_steps == engine.counters.steps == 4
    engine.park()
    engine.wake()
    assert answered(engine, "b", PROMPTS[0]) == first
    assert engine.counters.compiled_steps == engine.counters.steps == 8


def test_what_was_computed_without_it_is_no_beginning_for_what_is_computed_with_it(engine):
    compiled, engine._forward._compiled = engine._forward._compiled, None
    kept, running, other = ([first, *range(20, 45)] for first in (3, 4, 5))
    answered(engine, "kept", kept)
    answered(engine, "kept too", kept)
    cached = engine.counters.cached_tokens
    assert cached == len(kept) - 1
    engine.submit(Request("running", running, Sampling(max_tokens=9, ignore_eos=True)))
    engine.step()
    engine._forward._compiled = compiled
    engine.step()
    engine.submit(Request("beside", running, Sampling(max_tokens=3, ignore_eos=True)))
    finished(engine)
    answered(engine, "kept again", kept)
    answered(engine, "other", other)
    assert engine.counters.cached_tokens == cached
    for ids in (running, kept, other):
        answered(engine, "again", ids)
    assert engine.counters.cached_tokens == cached + len(running) + len(kept) + len(other) - 3


def test_without_a_compiler_it_says_so_once(tmp_path, model, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = Compiled(model, proof_of(model), tmp_path)
    for _ in range(3):
        assert compiled.poll() is None
    assert compiled.state == "not compiled: there is no C++ compiler 'no-such-compiler' (install g++, or set CXX)"
    assert len(caplog.records) == 1


def test_without_kernels_it_says_so(tmp_path, model, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    assert Compiled(model, proof_of(model), tmp_path).state == "not compiled: no native kernels"


@pytest.mark.parametrize("broken", ["step.so", "shim.so", "tensors.json", "constants.pt"])
def test_a_broken_package_is_made_anew(tmp_path, folder, model, step, broken, caplog):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (package,) = (path.parent for path in tmp_path.glob("*/step.so"))
    (package / broken).write_bytes(b"\x00")
    compiled = Compiled(model, proof_of(model), tmp_path)
    assert compiled.poll() is None
    assert compiled.state == "being compiled"
    assert "its package is broken" in caplog.text
    assert not package.exists()
    compiled.close()


def test_a_step_that_answers_otherwise_is_never_used(tmp_path, folder, model, step):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    wrong = [(ids, -logits) for ids, logits in proof_of(model)]
    first = Compiled(model, wrong, tmp_path)
    assert first.poll() is None
    assert "its logits would be off by" in first.state
    again = Compiled(model, wrong, tmp_path)
    assert again.poll() is None
    assert again.state == first.state


def test_ending_it_ends_the_compilers(tmp_path, model):
    compiled = Compiled(model, proof_of(model), tmp_path)
    group = compiled._child.pid
    assert group_members(group)
    compiled.close()
    deadline = time.monotonic() + 30
    while group_members(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert compiled.poll() is None
    assert not list(tmp_path.glob("*/step.so"))


def group_members(group):
    found = []
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                with open(f"/proc/{process}/stat") as stat:
                    words = stat.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[2]) == group and words[0] != "Z":
                found.append(int(process))
    return found


class Stubborn(LlamaForCausalLM):
    """What it computes depends on what is computed."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        if float(found.logits.sum()) > 0:
            found.logits = found.logits * 2
        return found


def test_a_model_that_cannot_be_traced_is_tried_once(tmp_path, caplog):
    torch.manual_seed(0)
    model = Stubborn(LlamaConfig(**SIZES)).eval()
    first = Compiled(model, proof_of(model), tmp_path)
    assert wait(first) is None
    assert first.state.startswith("not compiled: it cannot be traced: ")
    again = Compiled(model, proof_of(model), tmp_path)
    assert again.state == first.state
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


def test_a_model_that_cannot_be_described_is_run_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.something = lambda: None
    compiled = Compiled(model, proof_of(model), tmp_path)
    assert compiled.state.startswith("not compiled: LlamaForCausalLM cannot be described to another process: ")


def test_a_described_model_has_the_shapes_and_the_small_values(model):
    dumped = dump(model)
    assert len(dumped) < 100_000
    other, tensors = restore(dumped)
    wanted = tensors_of(model)
    assert set(tensors) <= set(wanted)
    for name, tensor in tensors.items():
        assert tensor.shape == wanted[name].shape
        assert tensor.dtype == wanted[name].dtype
        if tensor.numel() <= SMALL:
            assert torch.equal(tensor, wanted[name])
    frequencies = next(name for name in tensors if name.endswith("inv_freq"))
    assert torch.equal(tensors[frequencies], model.model.rotary_emb.inv_freq)
    assert other.get_output_embeddings().codes is other.get_input_embeddings().codes  # one tensor, twice


def test_every_tensor_has_one_name():
    model = nn.Module()
    model.shared = torch.zeros(2)
    model.inner = nn.Linear(3, 4)
    model.inner.many = [model.shared, {"deep": torch.ones(1)}, (torch.ones(5),)]
    found = tensors_of(model)
    assert len({id(tensor) for tensor in found.values()}) == len(found) == 5
    for one, other in pairwise(sorted(found)):
        assert one != other


def test_who_compiles_ends_with_whoever_asked_also_while_it_imports(tmp_path):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(600)\n")
    child = subprocess.Popen(
        [sys.executable, "-m", "pipelines.engine.compiled_child", str(tmp_path / "none")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout.readline() == b"importing\n"
        child.stdin.close()
        assert child.wait(timeout=30) == -signal.SIGKILL
    finally:
        child.kill()
        child.stdout.close()
