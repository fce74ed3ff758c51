"""A folder of files to a model: what a GGUF or safetensors file holds is what the model is made of."""

import gguf
import pytest
import torch
from transformers import LlamaConfig

from pipelines.engine import Limits
from pipelines.engine.weights import WeightsError, load
from tests.gguf_file import write_gguf
from tests.models import CONTEXT, SIZES, build, prompt


@pytest.fixture(scope="module")
def llama():
    return build("llama")


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
    ids = torch.tensor([prompt(20)])
    torch.testing.assert_close(loaded(ids).logits, llama(ids).logits)


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
