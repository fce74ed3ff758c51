"""Compiles a model's step, ahead of time, in a process of its own, which `compiled_child` is.

Reads the model without its weights from FOLDER.model, and makes FOLDER whole or not at all:

    step.so      the step, without weights
    shim.so      what it calls for linear layers and attention
    tensors.json the weights it asks for, by the names in `compiled_skeleton`
    constants.pt what it asks for that no model has: tensors made while it was traced

Where the model cannot be a step, FOLDER.refused says why, and nobody tries again.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._inductor.exc import CppCompileError
from torch.export import Dim

from pipelines import compiler
from pipelines.engine.compiled_ops import C_FUNCTIONS, Step, Untraceable, step_caches
from pipelines.engine.compiled_skeleton import restore
from pipelines.engine.slots import Unsupported

SHIM = Path(__file__).with_name("shim.cpp")
_MOST = 1 << 20  # of any size that may change


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the same
        if folder.exists():
            return
        scratch = folder.with_suffix(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was ended
        made = scratch / "made"
        made.mkdir(parents=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        try:
            build(*restore(folder.with_suffix(".model").read_bytes()), made, scratch)
        except (Untraceable, Unsupported) as error:
            folder.with_suffix(".refused").write_text(str(error))
            raise SystemExit(str(error)) from None
        else:
            os.replace(made, folder)
        finally:
            shutil.rmtree(scratch)
        folder.with_suffix(".model").unlink()


def build(model: Any, tensors: dict[str, Tensor], made: Path, scratch: Path) -> None:
    """The four files into `made`; `scratch` is for what the compilers leave lying about."""
    compiler = _compiler(scratch)
    _compile_shim(compiler, made / "shim.so")
    names = {_place(tensor): name for name, tensor in tensors.items()}
    with torch.no_grad():
        exported = _export(Step(model))
        module = exported.module()
        shutil.copy(_compile(module, exported.example_inputs, compiler, scratch), made / "step.so")
    wanted, own = {}, {}
    held = [module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)]
    for place, tensor in itertools.chain(*held, exported.constants.items()):
        if _place(tensor) in names:
            wanted[place] = names[_place(tensor)]
        else:
            own[place] = tensor
    (made / "tensors.json").write_text(json.dumps(wanted))
    torch.save(own, made / "constants.pt")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _compiler(scratch: Path) -> str:
    """The C++ compiler, told to bring its own library: Triton's processes have one that may be older."""
    script = scratch / "compiler"
    command = shlex.join([*compiler.command(), *compiler.WITHOUT_OTHERS])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    return str(script)


def _compile_shim(compiler: str, path: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", str(SHIM), "-o", str(path)]
    subprocess.run([*command, f"-L{libraries}", "-ltorch_cpu"], check=True)


def _export(step: Step) -> Any:
    rows, kept, slots, length = (Dim(name, min=1, max=_MOST) for name in ("rows", "kept", "slots", "length"))
    caches = step_caches(step.model.config, slots=5, length=64)
    inputs = (
        torch.zeros(1, 3, dtype=torch.long),
        *(torch.zeros(count, dtype=torch.long) for count in (3, 3, 2)),
        [layer.keys for layer in caches],
        [layer.values for layer in caches],
    )
    sizes = ({1: rows}, {0: rows}, {0: rows}, {0: kept}, *([{0: slots, 2: length}] * len(caches),) * 2)
    try:
        return torch.export.export(step, inputs, dynamic_shapes=sizes, strict=False)
    except (Untraceable, Unsupported):
        raise
    except Exception as error:
        raise Untraceable(f"it cannot be traced: {_first_line(error)}") from error


def _compile(module: Any, inputs: Any, compiler: str, scratch: Path) -> Path:
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": C_FUNCTIONS,
        "cpp.cxx": (None, compiler),
        "aot_inductor.precompile_headers": False,  # nothing that outlives this
        "aot_inductor.enable_line_tables": False,
        "cpp.threads": 1,  # what is left between the operators is too small to share
    }
    try:
        library = Path(str(torch._inductor.aot_compile(module, *inputs, options=options)))
    except Exception as error:
        if isinstance(getattr(error, "inner_exception", error), CppCompileError | OSError):
            raise  # of this machine, today: not of the model
        raise Untraceable(f"it cannot be compiled: {_first_line(error)}") from error
    others = library.with_suffix(".json")
    if others.exists():  # written for torch's loader, which would call them through Python
        names = sorted({node["node"]["target"] for node in json.loads(others.read_text())["nodes"]})
        raise Untraceable(f"it calls what compiled code cannot: {', '.join(names)}")
    return library


def _first_line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {said}"
