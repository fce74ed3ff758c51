"""A compiled step in this process: its library, the model's own tensors as its weights, and one call a step.

torch has a loader for these, but it holds Python's lock while a step runs, tens of milliseconds in which no other
thread of the server answers; the library's own C interface (torch/csrc/inductor/aoti_runtime/interface.h) does not.
Knows how `compiled_build` lays its folder out; knows no model, no engine, and not when to use a step.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import weakref
from collections.abc import Mapping, Sequence
from ctypes import byref, c_bool, c_char_p, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.engine.native import Kernels

_CAPSULE_POINTER = ctypes.pythonapi.PyCapsule_GetPointer
_CAPSULE_POINTER.restype, _CAPSULE_POINTER.argtypes = c_void_p, [ctypes.py_object, c_char_p]
_CAPSULE = ctypes.pythonapi.PyCapsule_New
_CAPSULE.restype, _CAPSULE.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]


class StepError(RuntimeError):
    """A compiled step that cannot be loaded or did not run."""


class _Constant(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("handle", c_void_p))


class Step:
    """Tokens to logits, as the model's own forward does, with keys and values written in place.

    `tensors` are the live model's, by the names of `compiled_skeleton`; they are used where they are.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], kernels: Kernels, threads: int) -> None:
        try:
            shim = ctypes.CDLL(str(folder / "shim.so"), ctypes.RTLD_GLOBAL)  # the step's functions are found there
            functions = (ctypes.cast(each, c_void_p) for each in (kernels.linear, kernels.rows, kernels.attention))
            shim.triptych_shim_use(*functions, c_int64(threads))
            self._library = ctypes.CDLL(str(folder / "step.so"))
            self._container = c_void_p()
            self._call("CreateWithDevice", byref(self._container), c_size_t(1), b"cpu", None, container=False)
            self._give(_constants(folder, tensors), shim)
        except (OSError, AttributeError, ValueError, pickle.UnpicklingError) as error:
            raise StepError(f"{folder.name}: {error}") from error
        self._run = self._library.AOTInductorModelContainerRun

    def __call__(
        self, input_ids: Tensor, positions: Tensor, slots: Tensor, wanted: Tensor, layers: Sequence[Any]
    ) -> Tensor:
        """The logits [W, vocabulary] after the tokens at `wanted` [W], float32.

        `input_ids` [1, T], and of each its position and slot, [T], int64, in any mixture of decoding rows and parts of
        prompts, a prompt's in order. Each of `layers` has `keys` and `values`, [slots, heads, length, dim].
        """
        caches = [*(layer.keys for layer in layers), *(layer.values for layer in layers)]
        inputs = _handles([input_ids, positions, slots, wanted, *caches])
        output = c_void_p()
        if self._run(self._container, inputs, c_size_t(len(inputs)), byref(output), c_size_t(1), None, None):
            raise StepError("the compiled step failed")
        (logits,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_CAPSULE(output, None, None)])
        return logits

    def _give(self, tensors: Mapping[str, Tensor], shim: ctypes.CDLL) -> None:
        """They are not copied: the handles keep them."""
        count = c_size_t()
        self._call("GetNumConstants", byref(count))
        given = (_Constant * count.value)()
        names = []
        for at in range(count.value):
            name, place = c_char_p(), c_char_p()
            self._call("GetConstantName", c_size_t(at), byref(name))
            self._call("GetConstantOriginalFQN", c_size_t(at), byref(place))
            names.append((name.value, (place.value or b"").decode()))
        if lacking := [place for _, place in names if place not in tensors]:
            raise ValueError(f"it asks for {len(lacking)} tensors that the model has not, first {lacking[0]}")
        handles = _handles([tensors[place] for _, place in names])
        weakref.finalize(self, _free, self._library, shim, self._container, handles)
        for at, handle in enumerate(handles):
            given[at] = _Constant(names[at][0], handle)
        self._call("UpdateUserManagedConstantBufferPairs", given, count, c_bool(False), c_bool(True))

    def _call(self, function: str, *arguments: Any, container: bool = True) -> None:
        found = getattr(self._library, f"AOTInductorModelContainer{function}")
        if found(*([self._container] if container else []), *arguments):
            raise ValueError(f"{function} failed")


def _constants(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names: dict[str, str] = json.loads((folder / "tensors.json").read_text())
    own: dict[str, Tensor] = torch.load(folder / "constants.pt", weights_only=True)
    return own | {place: tensors[name] for place, name in names.items() if name in tensors}


def _free(library: ctypes.CDLL, shim: ctypes.CDLL, container: c_void_p, handles: Any) -> None:
    library.AOTInductorModelContainerDelete(container)
    for handle in handles:
        shim.aoti_torch_delete_tensor_object(c_void_p(handle))


def _handles(tensors: list[Tensor]) -> Any:
    """Handles that whoever gets them owns."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    return (c_void_p * len(capsules))(*(_CAPSULE_POINTER(capsule, None) for capsule in capsules))
