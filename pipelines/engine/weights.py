"""A folder of files to a model: safetensors as transformers loads them, or one GGUF file; quantised or not.

Knows no request and no engine. What a model allows is read by `limits`, which needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from pipelines.engine import Limits
from pipelines.engine.codes import Codes, codes_or_nearest, exact, is_quantised, quantised
from pipelines.engine.gguf_file import GgufFile
from pipelines.engine.limits import read_limits
from pipelines.engine.swap import Swap, is_tied, linears_of, swap_here

Array = np.ndarray[Any, np.dtype[Any]]

# Tensors that are in a GGUF file for llama.cpp alone: transformers computes them from the config.
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_EMBEDDING = "model.embed_tokens.weight"


class WeightsError(ValueError):
    """The folder's weights cannot be loaded; the message names what is wrong."""


def load(
    home: Path,
    *,
    dtype: str = "auto",
    quantize: str = "",
    device: str = "cpu",
    device_map: str = "",
    pictures: bool = False,
) -> tuple[Any, Limits]:
    """The model in `home`, ready to run, and its limits. `pictures`: with the half of it that sees.

    `dtype` auto: bfloat16 on a GPU; on a CPU what is quantised stays so, in a model of the dtype that its kernels
    take, and the rest is float32. `quantize` int8 or int4: safetensors' linear layers are, on a CPU. `device_map` is
    transformers': over which devices the layers are laid, where one is too small.
    """
    limits = read_limits(home)
    logging.disable_progress_bar()  # it would be drawn into a server's log
    swap = swap_here() if dtype == "auto" and device == "cpu" else None
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    kind = getattr(torch, automatic if dtype == "auto" else dtype)
    found = sorted(home.glob("*.gguf"))
    if len(found) > 1:
        raise WeightsError(f"{home} holds several GGUF files: {', '.join(file.name for file in found)}")
    if found:
        if pictures:
            raise WeightsError(
                f"{found[0].name} is GGUF, which is loaded of language models alone: use its safetensors"
            )
        if quantize:
            raise WeightsError(f"{found[0].name} is quantised already: leave out quantize = {quantize!r}")
        model = _load_gguf(home, found[0], kind, swap)
    elif any(home.glob("*.safetensors")):
        if quantize and swap is None:
            raise WeightsError(
                f"quantize = {quantize!r} needs a CPU, dtype = 'auto' and the native kernels "
                "(python -m pipelines.engine.native) or AVX-512: leave it out"
            )
        kinds = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
        placed = {"device_map": device_map} if device_map else {}
        model = kinds.from_pretrained(home, dtype=swap.dtype if quantize and swap else kind, **placed)
        if quantize and swap:
            _quantise(model, swap, 4 if quantize == "int4" else 8)
    else:
        raise WeightsError(f"{home} holds neither *.safetensors nor a *.gguf file")
    return (model if device_map else model.to(device)).eval(), limits


def _quantise(model: Any, swap: Swap, bits: int) -> None:
    """The linear layers; a head that is the embedding has 8 bits, since it is looked up as well."""

    def codes_of(weight: Tensor, bits: int) -> Codes:
        return quantised(weight.detach().float().numpy(), bits)

    tied, embedding = is_tied(model), model.get_input_embeddings()
    head = model.get_output_embeddings()
    linears = {
        name: lambda weight=layer.weight: codes_of(weight, bits)
        for name, layer in linears_of(model).items()
        if swap.takes(*layer.weight.shape) and not (tied and layer is head)
    }
    swap.put(model, linears)
    if tied and swap.takes(*embedding.weight.shape):
        swap.put_embedding(model, codes_of(embedding.weight, 8), tied=True)


def _load_gguf(home: Path, path: Path, dtype: torch.dtype, swap: Swap | None) -> Any:
    """The config builds the model, the GGUF file fills it; transformers ties and computes the rest."""
    config = AutoConfig.from_pretrained(home)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    file = GgufFile(path)
    names = _names(file, empty)
    linears = _linears(file, names, empty, swap) if swap else {}
    embedding = _embedding(file, names, swap) if swap else None
    without = {f"{name}.weight" for name in linears}
    if swap and (linears or embedding):
        dtype = swap.dtype
        if embedding and swap.swaps_embedding(empty):
            without.add(_EMBEDDING)
    state = _state(file, names, config, dtype, without)
    model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if swap:
        tied = is_tied(model)
        swap.put(model, linears)
        if embedding and (tied or _EMBEDDING in without):
            swap.put_embedding(model, embedding(), tied=tied)
    return model


def _linears(file: GgufFile, names: dict[str, str], model: Any, swap: Swap) -> dict[str, Callable[[], Codes]]:
    """The linear layers whose blocks can stay codes, by name, and what reads these."""
    adapt, config = _ADAPT[file.architecture], model.config.get_text_config()

    def read(stored: str) -> Codes:
        # What `adapt` does to a linear layer is to order its rows, and rows can be ordered as blocks.
        return codes_or_nearest(file.tensors[stored][0], adapt(stored, file.rows(stored), config))

    stored_of = {name: names[f"{name}.weight"] for name in linears_of(model) if f"{name}.weight" in names}
    return {name: partial(read, stored) for name, stored in stored_of.items() if _takes(swap, file, stored)}


def _embedding(file: GgufFile, names: dict[str, str], swap: Swap) -> Callable[[], Codes] | None:
    stored = names[_EMBEDDING]
    if not _takes(swap, file, stored):
        return None
    return lambda: codes_or_nearest(file.tensors[stored][0], file.rows(stored))


def _takes(swap: Swap, file: GgufFile, stored: str) -> bool:
    kind, shape, _ = file.tensors[stored]
    return len(shape) == 2 and (exact(kind) or (swap.rounds and is_quantised(kind))) and swap.takes(*shape)


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
