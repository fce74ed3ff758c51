"""Models of random weights in a named shape, and what a step of one must read. Needs torch and transformers alone.

Knows no engine and no file: a machine with a card needs no download.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

_COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
_COPIES = 10


def config(shape: str) -> Any:
    """The published shape's numbers; `tiny` is for a test."""
    if shape == "llama-8b":  # Llama 3.1 8B
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
        )
    if shape == "qwen3-0.6b":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=True,
        )
    if shape == "tiny":
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    raise ValueError(f"no shape {shape!r}: it is one of {', '.join(SHAPES)}")


SHAPES = ("llama-8b", "qwen3-0.6b", "tiny")


def random_model(shape: str, device: str) -> Any:
    """bfloat16, the same weights every time. Made where it will be: 8 billion numbers take long on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16)
    model.config.eos_token_id = None  # a random model must not end
    return model.to(device).eval()


def step_bytes(model: Any, context: int) -> int:
    """What a step of one stream must read: all weights but an embedding that is only looked up, and keys and values."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        del weights[embedding.data_ptr()]
    return int(sum(weights.values())) + context * position_bytes(model)


def position_bytes(model: Any) -> int:
    """Keys and values of one token."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * head * model.dtype.itemsize)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the best of several copies within the device's memory: its roof."""
    source = torch.ones(_COPY_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES):
        _synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
