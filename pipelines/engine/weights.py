"""A folder of files to a model: safetensors as transformers loads them, or one GGUF file, packed or dequantised.

Knows no request and no engine. What a model allows is read by `limits`, which needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from pipelines.engine import Limits
from pipelines.engine.gguf_file import GgufFile
from pipelines.engine.limits import read_limits
from pipelines.engine.packed import Codes, PackedLinear, codes, fast_here, packable

Array = np.ndarray[Any, np.dtype[Any]]

# Tensors that are in a GGUF file for llama.cpp alone: transformers computes them from the config.
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class WeightsError(ValueError):
    """The folder's weights cannot be loaded; the message names what is wrong."""


def load(home: Path, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Limits]:
    """The model in `home`, ready to run, and its limits.

    `dtype` auto: bfloat16 on a GPU; on a CPU a GGUF file's blocks packed, in a model of bfloat16, else float32.
    """
    limits = read_limits(home)
    logging.disable_progress_bar()  # it would be drawn into a server's log
    packed = dtype == "auto" and device == "cpu" and fast_here()
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    kind = getattr(torch, automatic if dtype == "auto" else dtype)
    found = sorted(home.glob("*.gguf"))
    if len(found) > 1:
        raise WeightsError(f"{home} holds several GGUF files: {', '.join(file.name for file in found)}")
    if found:
        model = _load_gguf(home, found[0], kind, packed=packed)
    elif any(home.glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(home, dtype=kind)
    else:
        raise WeightsError(f"{home} holds neither *.safetensors nor a *.gguf file")
    return model.to(device).eval(), limits


def _load_gguf(home: Path, path: Path, dtype: torch.dtype, *, packed: bool) -> Any:
    """The config builds the model, the GGUF file fills it; transformers ties and computes the rest."""
    config = AutoConfig.from_pretrained(home)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    file = GgufFile(path)
    names = _names(file, empty)
    linears = _packable_linears(file, names, empty) if packed else set()
    if linears:
        dtype = torch.bfloat16
    state = _state(file, names, config, dtype, without=linears)
    model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if linears:
        _pack(model, file, names, linears)
    return model


def _names(file: GgufFile, model: Any) -> dict[str, str]:
    """The stored name of each of the model's tensors. One too few, too many or of another shape is an error."""
    if file.architecture not in _ADAPT:
        known, name = ", ".join(sorted(_ADAPT)), file.path.name
        raise WeightsError(f"{name} is {file.architecture}; GGUF is loaded of {known}: use its safetensors")
    config = model.config.get_text_config()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    names = file.names_of(shapes, config.num_hidden_layers)
    if missing := sorted(name for name, stored in names.items() if stored not in file.tensors):
        raise WeightsError(f"{file.path.name} lacks {len(missing)} tensors of the model, first {missing[0]}")
    if unknown := sorted(file.tensors.keys() - set(names.values()) - set(_COMPUTED)):
        raise WeightsError(f"{file.path.name} has {len(unknown)} tensors too many, first {unknown[0]}")
    for name, wanted in shapes.items():
        if (shape := file.tensors[names[name]][1]) != wanted:
            raise WeightsError(f"{file.path.name}: {names[name]} is {shape}, not {wanted}")
    return names


def _state(
    file: GgufFile, names: dict[str, str], config: Any, dtype: torch.dtype, without: Container[str]
) -> dict[str, Tensor]:
    """Every tensor of the model by its transformers name; of those in `without` no more than the shape."""
    adapt, text = _ADAPT[file.architecture], config.get_text_config()
    state = {}
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for name, stored in names.items():
            if name in without:  # one number, seen as many
                state[name] = torch.zeros((), dtype=dtype).expand(file.tensors[stored][1])
            else:
                array = adapt(stored, file.read(stored, pool), text)
                state[name] = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return state


def _packable_linears(file: GgufFile, names: dict[str, str], model: Any) -> set[str]:
    """The names of the weights, of linear layers alone, whose blocks can stay as they are."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name in linears & names.keys() if packable(*file.tensors[names[name]][:2])}


def _pack(model: Any, file: GgufFile, names: dict[str, str], linears: set[str]) -> None:
    """Put a `PackedLinear` in place of each of these, and of a head that shares the embedding's weight."""
    adapt, config = _ADAPT[file.architecture], model.config.get_text_config()

    def blocks(stored: str) -> Codes:
        # What `adapt` does to a linear layer is to order its rows, and rows can be ordered as blocks.
        return codes(file.tensors[stored][0], adapt(stored, file.rows(stored), config))

    for name in linears:
        place = name.removesuffix(".weight")
        model.set_submodule(place, PackedLinear(blocks(names[name]), bias=model.get_submodule(place).bias))
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is embedding:
        stored = names["model.embed_tokens.weight"]
        if packable(*file.tensors[stored][:2]):
            model.set_output_embeddings(PackedLinear(blocks(stored), tied=embedding))


def _as_stored(name: str, array: Array, config: Any) -> Array:
    return array


def _llama(name: str, array: Array, config: Any) -> Array:
    """The rows of q and k are stored in llama.cpp's order of rotary pairs (its LlamaModel.permute): back."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return array
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _gemma(name: str, array: Array, config: Any) -> Array:
    """Norm weights are stored with the 1 added that transformers adds when it runs."""
    return array - 1 if name.endswith("norm.weight") else array


_ADAPT: dict[str, Callable[[str, Array, Any], Array]] = {
    "llama": _llama,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "qwen2": _as_stored,
    "qwen3": _as_stored,
}
